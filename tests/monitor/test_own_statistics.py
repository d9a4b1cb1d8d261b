"""A user's own statistic: a function of the merged moments, looked at before training starts."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor
from stabnorm.monitor.detailed import DetailedMoments, DetailedPast
from stabnorm.monitor.past import Moments, Past
from stabnorm.monitor.statistics import CATALOGUE, Statistic, resolve


def power(now: Moments, past: Past) -> Tensor:
    del past
    return now.mean_over_channels(now.second_moment)


def model() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5), nn.RMSNorm(5))


def test_it_stands_beside_the_catalogues_and_sees_micro_batches_as_one() -> None:
    net, x = model(), torch.randn(12, 8)
    with StabilityMonitor(net, ["amax", Statistic("power", compute=power)]) as monitor:
        for part in x.chunk(3):
            net(part)
        monitor.step()
    history = monitor.history()
    assert tuple(history) == ("amax", "power", "tokens")
    torch.testing.assert_close(history["power"][0, 0], x.square().mean(), rtol=1e-6, atol=0)
    assert [s.name for s in monitor.statistics] == ["amax", "power"]


def test_what_it_needs_is_gathered_for_it() -> None:
    def outlying(now: DetailedMoments, past: DetailedPast) -> Tensor:
        return now.detail.means[:, 0] + now.token[:, 0] + 0 * past.gain.nan_to_num(0).sum(-1)

    own = Statistic("outlying", compute=outlying, needs=("token_shape", "tokens"), remembers=True)
    net, x = model(), torch.randn(12, 8)
    with StabilityMonitor(net, [own]) as monitor:
        net(x)
        monitor.step()
    expected = x.abs().quantile(0.5, -1).mean() + x.std(-1, correction=0).mean()
    torch.testing.assert_close(monitor.history()["outlying"][0, 0], expected, rtol=1e-6, atol=0)


def test_its_alarm_and_its_past_raise_alerts_and_a_flush_keeps_it() -> None:
    own = Statistic("power", compute=power, alarm=100.0, advice="look here")
    net = model()
    with StabilityMonitor(net, [own], flush_every=3) as monitor:
        for step in range(7):
            net(torch.randn(64, 8) * (20 if step == 5 else 1))
            monitor.step()
    assert monitor.history()["power"].shape == (7, 2)
    assert [(a.step, a.layer, a.statistic, a.reason) for a in monitor.alerts] == [(5, "0", "power", "look here")]


def test_a_trial_leaves_no_trace() -> None:
    net, state = model(), torch.get_rng_state()
    with StabilityMonitor(net, ["amax", Statistic("power", compute=power)]) as monitor:
        assert torch.equal(state, torch.get_rng_state())
        monitor.step()
        net(torch.zeros(2, 8))
        monitor.step()
    assert monitor.history()["tokens"].tolist() == [[0, 0], [2, 2]]
    assert monitor.history()["amax"][1, 0] == 0


@pytest.mark.parametrize(
    ("statistic", "error", "match"),
    [
        (Statistic("amax", compute=power), ValueError, "cannot be called 'amax', that name is taken"),
        (Statistic("loss", compute=power), ValueError, "cannot be called 'loss', that name is taken"),
        (Statistic("nonfinite", compute=power), ValueError, "that name is taken; choose another"),
        (Statistic("my own", compute=power), ValueError, "letters, digits and underscores only, got 'my own'"),
        (Statistic("power"), TypeError, "statistic 'power' has no function: give compute="),
        (Statistic("power", compute=3), TypeError, "statistic 'power' has no function"),  # type: ignore[arg-type]
        (Statistic("power", compute=power, needs="token"), ValueError, "needs 'token', which nobody gathers; did you mean 'tokens'"),  # type: ignore[arg-type]  # noqa: E501
        (power, TypeError, "a statistic is a name or an object of class Statistic, got <function power"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_name(statistic: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=re.escape(match)):
        StabilityMonitor(model(), [statistic])


@pytest.mark.parametrize(
    ("compute", "match"),
    [
        (lambda now, past: now.second_moment, "'power' gives torch.float64 (2, 8), not one floating number per layer"),
        (lambda now, past: now.count, "gives torch.int64 (2,), not one floating number per layer, shape (2,)"),
        (lambda now, past: 1.0, "gives float, not one floating number per layer"),
        (lambda now, past: now.detail.means[:, 0], "failed on a trial: AttributeError"),
        (lambda now: now.mean, "failed on a trial: TypeError"),
        (lambda now, past: past.gain.sum(-1), "what it reads there it must name in needs="),
    ],
)
def test_a_function_that_does_not_give_a_number_per_layer_is_refused_before_training(compute: Any, match: str) -> None:
    with pytest.raises(ValueError, match=re.escape(match)):
        StabilityMonitor(model(), [Statistic("power", compute=compute)])


def test_two_of_one_name_are_refused_and_the_same_twice_is_one() -> None:
    own = Statistic("power", compute=power)
    assert resolve([own, "amax", own, "amax"]) == (own, CATALOGUE["amax"])
    with pytest.raises(ValueError, match="two different statistics are called 'power'"):
        resolve([own, Statistic("power", compute=lambda now, past: now.mean[:, 0])])


def test_a_changed_one_of_the_catalogue_may_be_given_under_another_name() -> None:
    from dataclasses import replace

    stricter = replace(CATALOGUE["crest"], name="strict_crest", threshold=10.0)
    with StabilityMonitor(model(), [stricter, "crest"]) as monitor:
        assert [s.threshold for s in monitor.statistics] == [10.0, 1000.0]


def test_a_failed_trial_needs_no_gradients_where_there_are_none() -> None:
    own = Statistic("both", compute=power, needs=("gradients", "tokens"))
    with pytest.raises(ValueError, match="holds gradient statistics only, and gradients=False leaves them out"):
        StabilityMonitor(model(), [own], gradients=False)
