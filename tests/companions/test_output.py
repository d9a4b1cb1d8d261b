"""Output logits, against float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from stabnorm import StabilityMonitor, valid_tokens
from stabnorm.companions.companion import sampled
from stabnorm.companions.output import OutputCompanion, sums_of_logits
from tests.companions.nets import DIM, VOCABULARY, Text, batch


def expected(logits: Tensor) -> list[float]:
    rows = logits.double().reshape(-1, logits.shape[-1])
    log_z = rows.logsumexp(-1)
    return [float(x) for x in (rows.mean(), rows.abs().max(), log_z.mean(), log_z.square().mean())]


def figures(model: nn.Module, run: object, **options: object) -> list[float]:
    with StabilityMonitor(model, companions=[OutputCompanion(**options)]) as monitor:  # type: ignore[arg-type]
        run()  # type: ignore[operator]
        monitor.step()
    return [float(values[0, 0]) for values in monitor.companions["output"].history().values()]


@pytest.mark.parametrize("tokens", [None, 3])
def test_figures_are_those_of_float64_however_the_batch_is_split(tokens: int | None) -> None:
    model, x = Text(), batch(6, 8)
    nn.init.normal_(model.head.bias, mean=4.0, std=3.0)
    logits = model(x).detach()[:, sampled(8, tokens)]
    whole = figures(model, lambda: model(x), tokens=tokens)
    parts = figures(model, lambda: [model(part) for part in x.split([1, 3, 2])], tokens=tokens)
    assert whole == pytest.approx(expected(logits), rel=2e-6)
    assert parts == pytest.approx(expected(logits), rel=2e-6)


def test_padding_does_not_count() -> None:
    model, x = Text(), batch(4, 7)
    valid = torch.rand(4, 7) < 0.6
    with valid_tokens(valid):
        measured = figures(model, lambda: model(x), tokens=None)
    assert measured == pytest.approx(expected(model(x).detach()[valid]), rel=2e-6)


@pytest.mark.parametrize("garbage", [1e6, float("inf"), float("nan")])
def test_what_stands_in_padding_has_no_part_in_any_figure(garbage: float) -> None:
    logits, valid = torch.randn(4, 7, 5), torch.rand(4, 7) < 0.6
    padded = sums_of_logits(torch.where(valid[..., None], logits, garbage), valid)
    packed = sums_of_logits(logits[valid])
    for name, value in padded._asdict().items():
        torch.testing.assert_close(value, getattr(packed, name), rtol=1e-12, atol=1e-12, msg=name)


def test_logits_of_classes_are_looked_at_whole() -> None:
    model = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY))
    x = torch.randn(40, DIM)
    assert figures(model, lambda: model(x), tokens=1) == pytest.approx(expected(model(x).detach()), rel=2e-6)


def test_recompute_and_evaluation_do_not_count() -> None:
    model, x = Text(), batch()

    def run() -> None:
        with set_checkpoint_early_stop(False):  # else the last layer is not recomputed to its end
            checkpoint(model, x[:1], use_reentrant=False).square().mean().backward()
        model(x[1:])  # a mean over the same twice would be the same: others that count once
        model.eval()(batch(9))
        model.train()

    assert figures(model, run, tokens=None) == pytest.approx(expected(model(x).detach()), rel=2e-6)


def test_large_logits_do_not_overflow() -> None:
    sums = sums_of_logits(torch.tensor([[[3e4, 0.0]]], dtype=torch.float16))
    assert sums.log_z.item() == 3e4
    assert sums.square.item() == 9e8


def test_the_output_layer_is_the_last_linear_one_the_models_own_or_named() -> None:
    model = Text()
    assert OutputCompanion().watch(model).rows == ("head",)
    assert OutputCompanion(layer=["attentions.0.proj", "head"]).watch(model).rows == ("attentions.0.proj", "head")
    model.get_output_embeddings = lambda: model.attentions[0].qkv  # type: ignore[assignment]  # as in transformers
    assert OutputCompanion().watch(model).rows == ("attentions.0.qkv",)
    with pytest.raises(ValueError, match="layer='lm_head': there is no such module in Text"):
        OutputCompanion(layer="lm_head").watch(model)
    with pytest.raises(ValueError, match="no output layer found in Sequential"):
        OutputCompanion().watch(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ValueError, match=r"tokens=0 is out of range. Give a whole number of 1 or more"):
        OutputCompanion(tokens=0)


def test_a_layer_that_is_not_called_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    model.spare = nn.Linear(4, 2)
    with StabilityMonitor(model, companions=["output"]) as monitor:
        monitor.step()
    assert "spare did not run in training mode" in caplog.text
