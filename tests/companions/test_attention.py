"""Attention as a model runs it: every kind is seen, once, and nothing changes."""

import copy
import math
import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stabnorm import StabilityMonitor, valid_tokens
from stabnorm.companions import _attention_calls as calls
from stabnorm.companions.attention import AttentionCompanion
from tests.companions.nets import DIM, HEADS, Fused, MultiHead, Text, batch, loss

ORIGINAL = (F.scaled_dot_product_attention, F.softmax, F.multi_head_attention_forward)


@pytest.fixture(autouse=True)
def _everything_is_put_back() -> Any:
    yield
    assert (F.scaled_dot_product_attention, F.softmax, F.multi_head_attention_forward) == ORIGINAL
    assert calls._running.viewers == []


def watched(model: nn.Module, run: Any, **options: Any) -> dict[str, Tensor]:
    companion = AttentionCompanion(**{"queries": None, **options})
    with StabilityMonitor(model, "economy", companions=[companion]) as monitor:
        run()
        monitor.step()
    return monitor.companions["attention"].history()


def projected(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys in float64, ``[batch, heads, tokens, features]``."""
    weight, bias = (
        (attention.qkv.weight, attention.qkv.bias)
        if isinstance(attention, Fused)
        else (attention.inner.in_proj_weight, attention.inner.in_proj_bias)
    )
    qkv = F.linear(x.double(), weight.double(), bias.double())
    q, k, _ = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return q, k


def entropies(q: Tensor, k: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean entropy, mean share, largest logit of each head, in float64, over queries that see two keys."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    visible = visible.expand(logits.shape)
    p = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()  # of what sees nothing
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    keys = visible.sum(-1)
    count = (keys > 1).double()
    mean = (entropy * count).sum((0, 2)) / count.sum((0, 2))
    share = (entropy / keys.clamp(min=2).log() * count).sum((0, 2)) / count.sum((0, 2))
    seen = logits.abs() * visible * count[..., None]
    return mean, share, seen.amax((0, 2, 3))


@pytest.mark.parametrize(
    "attention",
    [Fused(), Fused(causal=False), Fused(written_out=True), MultiHead(False), MultiHead(True)],
    ids=["causal", "full", "written out", "fast", "with weights"],
)
def test_every_kind_of_attention_is_that_of_float64(attention: nn.Module) -> None:
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.4)
    model = nn.Sequential(nn.LayerNorm(DIM), attention)
    x = torch.randn(4, 7, DIM)
    history = watched(model, lambda: model(x))
    visible = torch.ones(7, 7, dtype=torch.bool)
    visible = visible.tril() if getattr(attention, "causal", False) else visible
    q, k = projected(attention, F.layer_norm(x, (DIM,)))
    for got, expected in zip(history.values(), entropies(q, k, visible), strict=True):
        torch.testing.assert_close(got[0].double(), expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("need_weights", [False, True])
def test_key_padding_of_multi_head_attention_hides_keys_and_valid_tokens_the_queries(need_weights: bool) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(DIM), MultiHead(need_weights)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            out: Tensor = self.attention(self.norm(x), padding)
            return out

    model, x = Padded(), torch.randn(4, 7, DIM)
    valid = torch.arange(7) < torch.tensor([7, 3, 5, 1])[:, None]

    def run(garbage: float) -> dict[str, Tensor]:
        padded = torch.where(valid[..., None], x, garbage * torch.randn_like(x))
        with valid_tokens(valid):
            return watched(model, lambda: model(padded, ~valid))

    history = run(1.0)
    for name, values in run(1e3).items():
        torch.testing.assert_close(values, history[name])
    q, k = projected(model.attention, F.layer_norm(x, (DIM,)))
    expected = entropies(q, k, valid[:, None, None, :] & valid[:, None, :, None])
    for got, wanted in zip(history.values(), expected, strict=True):
        torch.testing.assert_close(got[0].double(), wanted, rtol=3e-6, atol=3e-6)


def test_cross_attention_has_its_own_heads() -> None:
    layer = nn.TransformerDecoderLayer(DIM, HEADS, batch_first=True, dropout=0.3)
    history = watched(layer, lambda: layer(torch.randn(2, 5, DIM), torch.randn(2, 9, DIM)))
    assert history["attention_entropy"].shape == (1, 2 * HEADS)
    assert (history["attention_entropy"] <= math.log(9) + 1e-6).all()
    assert not history["attention_entropy"].isnan().any()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in transformers, whose attentions call a function that they find in a table."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True)


class Grouped(nn.Module):
    """Four heads that share two key heads; the config has the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=4)
        self.q_proj, self.kv_proj = nn.Linear(DIM, 4 * 6), nn.Linear(DIM, 2 * 2 * 6)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv_proj(x).unflatten(-1, (2, 2, 6)).permute(2, 0, 3, 1, 4)
        return self.q_proj(x).unflatten(-1, (4, 6)).transpose(1, 2), k, v

    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.project(x)).transpose(1, 2).flatten(2)


class GroupedAttention(Grouped):
    """Under a name that says what it is."""


def test_grouped_queries_behind_a_function_of_their_own_are_seen() -> None:
    attention = GroupedAttention()
    model, x = nn.Sequential(nn.LayerNorm(DIM), attention), torch.randn(3, 7, DIM)
    history = watched(model, lambda: model(x))
    q, k, _ = attention.double().project(F.layer_norm(x, (DIM,)).double())
    expected = entropies(q * 0.4 * 6**0.5, k.repeat_interleave(2, 1), torch.ones(7, 7, dtype=torch.bool).tril())
    for got, wanted in zip(history.values(), expected, strict=True):
        torch.testing.assert_close(got[0].double(), wanted, rtol=3e-6, atol=3e-6)
    with pytest.raises(ValueError, match="no attention found"):
        StabilityMonitor(nn.Sequential(nn.LayerNorm(DIM), Grouped()), companions=["attention"])


def test_watching_changes_no_bit_and_leaves_the_random_state_alone() -> None:
    def train(monitored: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(4)
        model = Text(Fused(), MultiHead(True), MultiHead(False))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        monitor = StabilityMonitor(model, companions=["attention", "weights", "embedding", "output"])
        if monitored:
            monitor.attach()
        for _ in range(5):
            loss(model, batch()).backward()
            optimizer.step()
            if monitored:
                monitor.step()
            optimizer.zero_grad()
        monitor.detach()
        return [p.detach() for p in model.parameters()], torch.get_rng_state()

    bare, state = train(False)
    seen, other = train(True)
    assert all(torch.equal(a, b) for a, b in zip(bare, seen, strict=True))
    assert torch.equal(state, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_attention_counts_once(reentrant: bool) -> None:
    attention = nn.Sequential(nn.LayerNorm(DIM), Fused(), MultiHead(True))
    x = torch.randn(3, 6, DIM, requires_grad=True)

    def run(recompute: bool) -> None:
        y = checkpoint(attention, x, use_reentrant=reentrant) if recompute else attention(x)
        y.backward(torch.randn(3, 6, DIM))
        attention(x.flip(-1) ** 3)  # a mean over the same twice would be the same: another that counts once

    once, twice = watched(attention, lambda: run(False)), watched(attention, lambda: run(True))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("queries", [None, 3])
def test_micro_batches_and_calls_merge(queries: int | None) -> None:
    attention = Fused()
    model = nn.Sequential(nn.LayerNorm(DIM), attention)
    x = torch.randn(6, 7, DIM) * torch.arange(1, 7)[:, None, None]
    whole = watched(model, lambda: model(x), queries=queries)
    parts = watched(model, lambda: [model(part) for part in x.split([1, 3, 2])], queries=queries)
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values, rtol=1e-6, atol=1e-6)


def test_forwards_in_eval_mode_do_not_count() -> None:
    model = Text()

    def run() -> None:
        model(batch())
        model.eval()
        model(batch(9))
        model.train()

    torch.manual_seed(1)
    both = watched(model, run)
    torch.manual_seed(1)
    alone = watched(model, lambda: model(batch()))
    assert all(torch.equal(both[name], alone[name]) for name in both)


def test_an_exception_in_an_attention_leaves_nothing_behind() -> None:
    class Failing(Fused):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            super().forward(x, mask)
            raise RuntimeError("boom")

    model = nn.Sequential(nn.LayerNorm(DIM), Failing())
    with StabilityMonitor(model, companions=["attention"]):
        with pytest.raises(RuntimeError, match="boom"):
            model(torch.randn(2, 4, DIM))
        assert calls._running.viewers == []
        assert F.scaled_dot_product_attention is not ORIGINAL[0]
    F.scaled_dot_product_attention(*torch.randn(3, 1, 1, 2, 4))


def test_a_function_bound_by_name_before_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = ModuleType("bound")
    bound.attend = ORIGINAL[0]  # type: ignore[attr-defined]  # from torch.nn.functional import ... as attend
    monkeypatch.setitem(sys.modules, "bound", bound)

    class BoundAttention(nn.Module):
        num_heads = 2

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = bound.attend(x, x, x)
            return out

    BoundAttention.__module__ = "bound"
    model = nn.Sequential(BoundAttention(), nn.LayerNorm(5))
    history = watched(model, lambda: model(torch.randn(3, 2, 4, 5)))
    assert not history["attention_entropy"].isnan().any()
    assert bound.attend is ORIGINAL[0]


def test_two_monitors_on_one_model_see_the_same() -> None:
    model = Text(Fused(), Fused())
    with StabilityMonitor(model, companions=["attention"]) as a:
        with StabilityMonitor(model, companions=["attention"]) as b:
            model(batch())
            a.step()
            b.step()
        assert F.softmax is not ORIGINAL[1]  # the first is still on
        model(batch())
        a.step()
    first, second = (m.companions["attention"].history()["attention_entropy"] for m in (a, b))
    assert torch.equal(first[:1], second)
    assert not first.isnan().any()


def test_an_attention_within_an_attention_counts_for_the_inner_one() -> None:
    class Outer(nn.Module):
        num_heads = HEADS

        def __init__(self) -> None:
            super().__init__()
            self.inner = Fused(causal=False)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.inner(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(heads, 0 * heads, heads)
            return mixed.transpose(1, 2).flatten(2)

    model = nn.Sequential(nn.LayerNorm(DIM), Outer())
    history = watched(model, lambda: model(torch.randn(2, 6, DIM)))
    share = history["attention_entropy_share"][0]
    torch.testing.assert_close(share[:HEADS], torch.ones(HEADS))  # its keys are all the same
    assert (share[HEADS:] < 1 - 1e-4).all()


def test_copies_of_a_watched_model_are_not_watched() -> None:
    model = Text(Fused(), MultiHead(False))
    with StabilityMonitor(model, companions=["attention", "weights", "embedding", "output"]) as monitor:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(batch())
            other.load_state_dict(model.state_dict())
        monitor.step()
        history = monitor.companions["attention"].history()
    assert history["attention_entropy"].isnan().all()


def test_what_cannot_be_seen_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class OwnAttention(nn.Module):
        num_heads = 2

        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    model = nn.Sequential(nn.LayerNorm(DIM), Fused(), OwnAttention())
    watched(model, lambda: model(torch.randn(2, 4, DIM)))
    assert "no attention was seen in 2." in caplog.text
    assert "scaled_dot_product_attention" in caplog.text


def test_another_number_of_heads_than_said_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.LayerNorm(DIM), Fused())
    watched(model, lambda: [model(torch.randn(2, 4, DIM)) for _ in range(3)], heads=5)
    assert caplog.text.count("have 3 heads where 5 were expected: AttentionCompanion(heads=...)") == 1


def test_what_is_wrong_is_said_before_training() -> None:
    with pytest.raises(ValueError, match="no attention found in Sequential: a module counts"):
        StabilityMonitor(nn.Sequential(nn.LayerNorm(4)), companions=["attention"])
    with pytest.raises(ValueError, match="no attention found in Text under include='decoder'"):
        StabilityMonitor(Text(), companions=[AttentionCompanion(include="decoder")])
    silent = Text()
    del silent.attentions[0].num_heads
    assert StabilityMonitor(silent, companions=[AttentionCompanion(heads=3)]).companions["attention"].rows == (
        "attentions.0.head0",
        "attentions.0.head1",
        "attentions.0.head2",
    )
    with pytest.raises(ValueError, match=r"queries=0 is out of range. Give a whole number of 1 or more, or None"):
        AttentionCompanion(queries=0)


def test_rows_are_the_heads_that_are_wanted() -> None:
    model = Text(Fused(), MultiHead(False), Fused())
    rows = AttentionCompanion(include=["0", "1"], exclude="0").watch(model).rows
    assert rows == tuple(f"attentions.1.inner.head{i}" for i in range(HEADS))


def test_logits_beyond_the_bound_raise_an_alert_and_name_the_head() -> None:
    model = Text(Fused(causal=False), Fused(causal=False))
    attention: Any = model.attentions[1]
    with StabilityMonitor(model, companions=["attention"]) as monitor:
        for factor in (1, 1, 300, 1):
            with torch.no_grad():
                attention.qkv.weight[DIM // HEADS : 2 * DIM // HEADS] *= factor  # the queries of its second head
                attention.qkv.weight[DIM : 2 * DIM] *= factor
            model(batch())
            monitor.step()
    (alert,) = monitor.alerts
    assert (alert.step, alert.layer, alert.statistic) == (2, "attentions.1.head1", "attention_logit_max")
    assert alert.value > alert.threshold == 1e4


def test_autocast_does_not_round_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.LayerNorm(DIM), Fused(causal=False))
    seen: list[tuple[Tensor, Tensor]] = []
    original = F.scaled_dot_product_attention

    def keep(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((q.detach(), k.detach()))
        return original(q, k, *args, **kwargs)

    x = torch.randn(3, 6, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        history = watched(model, lambda: model(x))
        with monkeypatch.context() as patched:
            patched.setattr(F, "scaled_dot_product_attention", keep)
            model(x)
    q, k = (t.double() for t in seen[0])
    assert seen[0][0].dtype == torch.bfloat16
    for got, expected in zip(history.values(), entropies(q, k, torch.ones(6, 6, dtype=torch.bool)), strict=True):
        torch.testing.assert_close(got[0].double(), expected, rtol=3e-6, atol=3e-6)
