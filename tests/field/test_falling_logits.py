"""An attention whose logits fall goes flat: it is alarmed as one whose logits grow, and no bound is advised."""

import dataclasses

import pytest
import torch

from stabnorm.companions import AttentionCompanion
from stabnorm.monitor.alerts import Alert
from stabnorm.monitor.detect import RobustDetector
from stabnorm.monitor.onsets import OnsetFollower, Watched
from stabnorm.monitor.words import remedy_of

ROWS = tuple(f"blocks.{i}.attn.head0" for i in range(4))


def seen(factor: float, usual: float = 4.0) -> tuple[list[Alert], str]:
    """Let the logits of one head change by a factor at each of 40 steps, and return the alerts and what to try."""
    torch.manual_seed(0)
    values = usual * (1 + 0.03 * torch.randn(340, len(ROWS), 3))
    values[300:, 2, 2] *= factor ** torch.arange(40.0)
    detector = RobustDetector(AttentionCompanion.statistics, ROWS)
    tokens, nonfinite = torch.full((340, len(ROWS)), torch.inf), torch.zeros(340, len(ROWS), dtype=torch.bool)
    alerts = detector.update(0, values, tokens, nonfinite)
    onsets = OnsetFollower().add(alerts, detector.take_departures(), Watched(ROWS, steps=340))
    return alerts, "".join(onset.remedy for onset in onsets)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_logits_that_leave_their_past_are_alarmed_in_both_directions(factor: float) -> None:
    (alert,), remedy = seen(factor)
    assert (alert.layer, alert.statistic) == (ROWS[2], "attention_logit_max")
    assert 315 < alert.step < 325
    assert ("bound the attention logits" in remedy) is (factor > 1)
    assert ("stop what shrinks" in remedy) is (factor < 1)


@pytest.mark.parametrize("factor", [0.9, 1.02])
def test_logits_that_stay_so_small_that_all_keys_weigh_alike_raise_nothing(factor: float) -> None:
    assert seen(factor, usual=0.4) == ([], "")


def test_logits_that_leave_the_range_where_all_keys_weigh_alike_are_alarmed() -> None:
    (alert,), _ = seen(1.1, usual=0.8)
    assert alert.value > 2.4


def test_logits_that_grow_slowly_as_they_do_in_healthy_runs_raise_nothing() -> None:
    torch.manual_seed(0)
    values = 4 * (1 + 0.03 * torch.randn(1400, len(ROWS), 3))
    values[700:, 2, 2] *= 1.003 ** torch.arange(700.0)  # eight times as large in the end
    inputs = torch.full((1400, len(ROWS)), torch.inf), torch.zeros(1400, len(ROWS), dtype=torch.bool)
    assert RobustDetector(AttentionCompanion.statistics, ROWS).update(0, values, *inputs) == []
    steady = [dataclasses.replace(statistic, drifts=False) for statistic in AttentionCompanion.statistics]
    assert RobustDetector(steady, ROWS).update(0, values, *inputs)


@pytest.mark.parametrize("statistic", ["token_std_mean", "amax", "attention_logit_max"])
def test_no_remedy_against_growth_is_told_where_something_fell(statistic: str) -> None:
    words = {fell: remedy_of(statistic, first=False, back_to=9, fell=fell) for fell in (False, True)}
    assert "bound" in words[False]
    assert "shrinks" in words[True]
    assert "bound" not in words[True]


def test_an_entropy_that_falls_still_asks_for_bounded_logits() -> None:
    assert "bound the attention logits" in remedy_of("attention_entropy_share", first=False, back_to=9, fell=True)
