"""Remedies of growth over depth: LayerNorm Scaling, scaled residuals and output norms, each as its source states it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, StabNormError, convert_norms, find_norms, fold_gains, fold_norms
from stabnorm.nn.added_norm import NormedOutput
from stabnorm.nn.scaled_weights import ScaledWeights
from stabnorm.remedies import peri_norm, qk_norm, scale_by_depth, scale_residuals, sigma_reparametrize, undo
from tests.remedies.family import check_compiled, check_fold, in_the_family, largest, net, tokens, train


def by_sqrt_n(model: Any) -> Any:
    return scale_residuals(model, tokens(1), scale="1/sqrt(n)")


def skipinit(model: Any) -> Any:
    return scale_residuals(model, tokens(1), scale="skipinit")


def peri(model: Any) -> Any:
    return peri_norm(model, tokens(1))


def deep(depth: int = 24) -> Any:
    """A stack of random pre-norm blocks, the outputs of which are as large as their inputs."""
    torch.manual_seed(0)
    model: Any = net(depth=depth, width=64)
    for name, parameter in model.named_parameters():
        if name.endswith(("fc2.weight", "v_proj.weight", "out_proj.weight")):
            nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 1:
            nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
    return model


def variances(model: Any) -> Tensor:
    """The variance of what each norm of the blocks reads."""
    with StabilityMonitor(model) as monitor, torch.no_grad():
        model.train()(tokens(16, 8))
        monitor.step()
        scale = monitor.history()["token_std_mean"][-1]
    of_blocks = [i for i, name in enumerate(monitor.layers) if name.endswith(("norm1", "norm2"))]
    return scale[of_blocks].square()


@in_the_family
@pytest.mark.parametrize("apply", [scale_by_depth, by_sqrt_n, skipinit, peri])
def test_remedies_of_depth(apply: Callable[[Any], Any], check: Callable[..., None]) -> None:
    """What holds for every remedy."""
    check(net, tokens(), apply)


@pytest.mark.slow
@pytest.mark.parametrize("apply", [lambda m: scale_by_depth(m, "norm2"), by_sqrt_n, peri])
def test_a_compiled_model_is_one_graph(apply: Callable[[Any], Any]) -> None:
    check_compiled(lambda: net(depth=2), tokens(), apply)


@pytest.mark.parametrize("apply", [scale_by_depth, by_sqrt_n, skipinit])
def test_the_fold_is_exact(apply: Callable[[Any], Any]) -> None:
    check_fold(net, tokens(), apply)


# --- LayerNorm Scaling ---


def test_scaled_norms_are_norms_with_gain_and_bias_divided_by_the_root_of_the_depth() -> None:
    """T19: equal to a model whose gains and biases hold the scale, to 1e-6; the last norm is not scaled."""
    model, by_hand = net(depth=3).eval(), net(depth=3).eval()
    assert scale_by_depth(model).changed == [f"blocks.{i}.norm{j}" for i in range(3) for j in (1, 2)]
    with torch.no_grad():
        for depth, block in enumerate(by_hand.blocks, 1):
            for norm in (block.norm1, block.norm2):
                norm.weight /= math.sqrt(depth)
                norm.bias /= math.sqrt(depth)
    assert largest(model(tokens()), by_hand(tokens())) < 1e-6


def test_the_gains_hold_the_scale_after_a_fold_of_gains_and_of_norms() -> None:
    model = net(depth=3).eval()
    scale_by_depth(model)
    for result in (fold_gains(model, tokens()), fold_norms(model, tokens())):
        assert not any(isinstance(module, ScaledWeights) for module in result.model.modules())
        assert largest(result.model(tokens()), model(tokens())) < 1e-5


def test_the_variance_grows_slower_than_without_the_scale() -> None:
    """T19: on a random stack of 24 blocks the growth is less than linear, and pre-norm alone grows linearly."""
    plain, scaled = deep(), deep()
    scale_by_depth(scaled)
    without, with_scale = variances(plain), variances(scaled)
    assert with_scale[-1] < 0.35 * without[-1]
    late, early = with_scale[-1] - with_scale[len(with_scale) // 2], with_scale[len(with_scale) // 2] - with_scale[0]
    assert late < 0.5 * early


def test_a_scaled_norm_is_still_found_as_what_it_is() -> None:
    model = net()
    scale_by_depth(model)
    layers = find_norms(model)
    assert [layer.kind for layer in layers] == ["layer"] * 5
    assert layers[2].gain_parameter is model.blocks[1].norm1._parameters["weight"]
    torch.testing.assert_close(layers[2].gain, layers[2].gain_parameter / math.sqrt(2))
    report = convert_norms(model)
    assert report.converted == ["norm"]
    assert "convert first, then apply the remedy" in report.left["blocks.0.norm1"]


def test_norms_of_another_width_and_norms_behind_the_sum_are_left() -> None:
    model = net()
    qk_norm(model)
    left = scale_by_depth(model).left
    assert left["blocks.0.q_proj.head_norms.0"] == "it has 4 channels, and most norms of the blocks have 8"
    post = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with pytest.raises(StabNormError, match="post-norm"):
        scale_by_depth(post)
    with pytest.raises(StabNormError, match=r"no norms in repeated blocks. Blocks are children"):
        scale_by_depth(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    with pytest.raises(StabNormError, match="it is scaled already"):
        scale_by_depth(model)


def test_stages_share_one_depth_and_two_stacks_have_their_own() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
    stages = nn.Sequential(
        *(nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, norm_first=True),) * 1) for _ in "ab")
    )
    assert [change.action[-3:] for change in scale_by_depth(stages, "norm1").changes] == ["(1)", "(2)"]
    decoder = nn.TransformerDecoderLayer(8, 2, 16, norm_first=True)
    both = nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
         "decoder": nn.TransformerDecoder(decoder, 2)}
    )  # fmt: skip
    actions = [change.action[-3:] for change in scale_by_depth(both, "norm1").changes]
    assert actions == ["(1)", "(2)", "(1)", "(2)"]


def test_gemmas_gain_of_one_plus_weight_is_scaled_as_a_whole() -> None:
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm
    torch.manual_seed(0)

    class OneNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = gemma(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(self.norm(x))  # type: ignore[no-any-return]

    model: Any = nn.Sequential(OneNorm(), OneNorm())
    for block in model:
        nn.init.normal_(block.norm.weight)
    x = torch.randn(3, 8)
    before = model[1].norm(x)
    scale_by_depth(model)
    torch.testing.assert_close(model[1].norm(x), before / math.sqrt(2))


# --- scaled residuals ---


class Linear(nn.Module):
    """A residual branch whose map is the identity, read through a norm that does nothing in this test."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)  # type: ignore[no-any-return]


def test_equal_linear_branches_grow_by_less_than_e() -> None:
    """methods.md 3.7: (1 + 1/n)^n < e; 2^n without the scale."""
    stack: Any = nn.Sequential(*(Linear(4) for _ in range(12)))
    from stabnorm.remedies.residual_scaling import _scale

    for block in stack:
        _scale(block.fc, 1 / 12, False)
    x = torch.ones(1, 4)
    assert float(stack(x).detach().max()) == pytest.approx((1 + 1 / 12) ** 12, rel=1e-5)
    assert math.e > (1 + 1 / 12) ** 12


@pytest.mark.parametrize(
    ("scale", "factor"), [("1/n", 0.25), ("1/sqrt(n)", 0.5), (0.1, 0.1)]
)  # fmt: skip
def test_the_rule_sets_the_factor_of_every_branch(scale: Any, factor: float) -> None:
    model, by_hand = net().eval(), net().eval()
    changed = scale_residuals(model, tokens(1), scale=scale).changed
    assert changed == [f"blocks.{i}.{name}" for i in range(2) for name in ("out_proj", "fc2")]
    with torch.no_grad():
        for block in by_hand.blocks:
            for parameter in (*block.out_proj.parameters(), *block.fc2.parameters()):
                parameter.mul_(factor)
    assert largest(model(tokens()), by_hand(tokens())) < 1e-6


def test_skipinit_begins_as_the_trunk_and_learns() -> None:
    model = net()
    skipinit(model)
    x = model.embed(tokens())
    torch.testing.assert_close(model(tokens()), model.head(model.norm(x)))
    train(model, tokens())
    assert all(float(block.fc2.scale_gain.detach()) != 0 for block in model.blocks)


@pytest.mark.parametrize(
    ("scale", "error"), [("1/m", ValueError), (0.0, ValueError), (-1.0, ValueError), (None, TypeError)]
)
def test_a_wrong_scale_is_refused_and_changes_nothing(scale: Any, error: type[Exception]) -> None:
    model = net()
    with pytest.raises(error, match="scale"):
        scale_residuals(model, tokens(1), scale=scale)
    assert type(model.blocks[0].fc2) is nn.Linear


def test_an_example_that_does_not_run_and_a_model_without_branches_are_refused() -> None:
    with pytest.raises(ValueError, match="does not run on the example"):
        scale_residuals(net(), torch.randn(2, 3))
    with pytest.raises(StabNormError, match="no residual branch was found"):
        peri_norm(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"exclude='nothing' matches none of the 4 residual branches: 'blocks.0"):
        peri_norm(net(), tokens(1), exclude="nothing")


# --- Peri-LN ---


def test_the_variance_grows_linearly_with_output_norms() -> None:
    """T20: a line fits the variances over the depth with R^2 above 0.99, and its slope is 1 for each branch."""
    model = deep()
    peri(model)
    v = variances(model).double()
    depth = torch.arange(len(v), dtype=torch.float64)
    r = torch.corrcoef(torch.stack([depth, v]))[0, 1]
    assert float(r.square()) > 0.99
    assert float((v[-1] - v[0]) / (len(v) - 1)) == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("to", ["unified", "repbn"])
def test_switched_output_norms_fold_backward_and_no_norm_of_a_block_is_left(to: str) -> None:
    """T20: with offline norms the fold takes out all four norms of a block, exactly."""
    model = net().double()
    peri(model)
    convert_norms(model, to=to)
    train(model, tokens(), steps=5)
    model.eval()
    result = fold_norms(model, tokens(), strict=True)
    folded = {norm.name: norm.status for norm in result.norms}
    assert {name: status for name, status in folded.items() if "output_norm" in name} == {
        f"blocks.{i}.{name}.output_norm": "backward" for i in range(2) for name in ("out_proj", "fc2")
    }
    assert largest(result.model(tokens()), model(tokens())) < 1e-12


def test_torchs_own_attention_is_normalised_behind_its_output() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    model: Any = nn.Sequential(nn.Linear(8, 8), encoder)
    x = torch.randn(2, 5, 8)
    before = model.eval()(x)
    report = peri_norm(model, x)
    assert isinstance(encoder.layers[0].self_attn, NormedOutput)
    with torch.no_grad():  # where its fused path would run, which calls no norm
        torch.testing.assert_close(model.eval()(x), model.train()(x))
        assert largest(model(x), before) > 0.01
    undo(report)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), before.detach()) or largest(model(x), before) < 1e-5


def test_remedies_on_one_layer_fold_together_and_the_norm_among_them_stays() -> None:
    """A computed weight under an added norm: the fold takes the one and keeps the other."""
    model = net().double()
    scale_residuals(model, tokens(1), scale="1/n")
    peri(model)
    sigma_reparametrize(model, "fc2")
    train(model, tokens())
    model.eval()
    result = fold_norms(model, tokens())
    assert largest(result.model(tokens()), model(tokens())) < 1e-12
    assert isinstance(result.model.blocks[0].fc2, NormedOutput)  # type: ignore[index, union-attr]
    assert not any(isinstance(module, ScaledWeights) for module in result.model.modules())
