"""`qk_norm` bounds the logits by its gains, and `qk_clip` brings those of the heads above a threshold down to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, StabNormError, convert_norms, fold_norms
from stabnorm.remedies import qk_clip, qk_norm, sigma_reparametrize, undo
from tests.remedies.family import check_compiled, in_the_family, largest, net, tokens, train


class Fused(nn.Module):
    """An attention with queries, keys and values in one projection, as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Grouped(nn.Module):
    """Four heads of queries share two of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 2)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


def fused() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(Fused(), nn.LayerNorm(8))


def logits_of(model: Any, x: Tensor) -> dict[str, float]:
    """The largest logit of each head, as the companion measures it."""
    from stabnorm.companions import AttentionCompanion

    model.train()
    with StabilityMonitor(model, companions=[AttentionCompanion(queries=None)]) as monitor, torch.no_grad():
        model(x)
        monitor.step()
        rows, history = monitor.companions["attention"].rows, monitor.companions["attention"].history()
    return dict(zip(rows, history["attention_logit_max"][-1].tolist(), strict=True))


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@in_the_family
def test_qk_norm(check: Callable[..., None]) -> None:
    """What holds for every remedy."""
    check(net, tokens(), qk_norm)


@in_the_family
def test_qk_norm_of_one_projection(check: Callable[..., None]) -> None:
    check(fused, hidden(2, 5, 8), lambda model: qk_norm(model, norm="layer"))


@pytest.mark.slow
def test_a_compiled_model_is_one_graph() -> None:
    check_compiled(fused, hidden(2, 5, 8), qk_norm)


@pytest.mark.parametrize("build", [lambda: nn.Sequential(Grouped(), nn.LayerNorm(8)), fused])
def test_logits_stay_within_the_root_of_the_width_whatever_the_weights_are(build: Callable[[], Any]) -> None:
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100)
    x = hidden(2, 5, 8)
    assert max(logits_of(model, x).values()) > 100
    qk_norm(model)
    width = 2 if isinstance(model[0], Grouped) else 4
    assert max(logits_of(model, x).values()) <= width**0.5 + 1e-4


def test_the_values_of_one_projection_are_not_normalised() -> None:
    model = fused()
    x = hidden(2, 5, 8)
    before = model[0].qkv(x)
    qk_norm(model)
    after = model[0].qkv(x)
    torch.testing.assert_close(after[..., 16:], before[..., 16:])
    heads = before[..., :16].unflatten(-1, (4, 4))
    torch.testing.assert_close(after[..., :16], nn.functional.rms_norm(heads, (4,), eps=1e-5).flatten(-2))


@pytest.mark.parametrize("build", [net, fused])
def test_switched_norms_fold_backward_into_the_projections(build: Callable[[], Any]) -> None:
    model = build().double()
    x = tokens() if build is net else hidden(2, 5, 8).double()
    qk_norm(model)
    convert_norms(model, to="unified", include="head_norms")
    train(model, x, steps=3)
    model.eval()
    result = fold_norms(model, x)
    statuses = {norm.status for norm in result.norms if "head_norms" in norm.name}
    assert statuses == {"backward"}
    assert largest(result.model(x), model(x)) < 1e-12


def test_attentions_that_cannot_be_normalised_are_left_with_the_reason() -> None:
    model: Any = nn.ModuleDict({"own": nn.MultiheadAttention(8, 2), "plain": Fused()})
    report = qk_norm(model)
    assert report.changed == ["plain"]
    assert "use sigma_reparametrize" in report.left["own"]
    with pytest.raises(StabNormError, match="normalised already"):
        qk_norm(model)


# --- QK-Clip ---


@pytest.mark.parametrize("build", [net, fused, lambda: nn.Sequential(Grouped(), nn.LayerNorm(8))])
def test_only_the_heads_above_the_threshold_are_shrunk_and_end_at_it(build: Callable[[], Any]) -> None:
    model = build()
    x = tokens() if build is net else hidden(2, 5, 8)
    logits = logits_of(model, x)
    first, *others = sorted(logits, key=lambda name: -logits[name])
    threshold = (logits[first] + logits[others[0]]) / 2
    state = {name: t.clone() for name, t in model.state_dict().items()}
    report = qk_clip(model, logits, threshold)
    assert report.changed == [first]
    after = logits_of(model, x)
    assert after[first] == pytest.approx(threshold, rel=1e-4)
    before_it = [name for name in others if name.rpartition(".head")[0] == first.rpartition(".head")[0]]
    for name in before_it:
        assert after[name] == pytest.approx(logits[name], rel=1e-4)
    undo(report)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_torchs_attention_and_its_biases_are_shrunk() -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    nn.init.normal_(model["attn"].in_proj_bias)
    weight, bias = model["attn"].in_proj_weight.detach().clone(), model["attn"].in_proj_bias.detach().clone()
    qk_clip(model, {"attn.head1": 400.0, "attn.head0": float("nan")})
    ratio = model["attn"].in_proj_weight.detach() / weight
    shrunk = torch.ones(24)
    shrunk[4:8] = shrunk[12:16] = 0.5
    torch.testing.assert_close(ratio, shrunk[:, None].expand(24, 8))
    torch.testing.assert_close(model["attn"].in_proj_bias.detach(), bias * shrunk)


def test_nothing_above_the_threshold_changes_nothing() -> None:
    model = fused()
    report = qk_clip(model, {"0.head0": 99.0})
    assert (report.changed, report.preserves) == ([], "bits")


def test_what_cannot_be_shrunk_is_said() -> None:
    model = fused()
    with pytest.raises(ValueError, match=r"'0.head2', which is no head of the model"):
        qk_clip(model, {"0.head2": 200.0})
    with pytest.raises(TypeError, match="logits"):
        qk_clip(model, [200.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold"):
        qk_clip(model, {}, 0.0)
    sigma_reparametrize(model)
    with pytest.raises(StabNormError, match="reparametrized: shrink their gains"):
        qk_clip(model, {"0.head0": 200.0})
    model = fused()
    qk_norm(model)
    with pytest.raises(StabNormError, match="their scale does not count"):
        qk_clip(model, {"0.head0": 200.0})
