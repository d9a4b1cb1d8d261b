"""Alerts: what fires, what stays quiet, and that the detector survives what it detects."""

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from stabnorm import StabilityMonitor
from stabnorm.monitor import Statistic, detect
from stabnorm.monitor.alerts import Alert
from stabnorm.monitor.detect import RobustDetector, watched_together
from stabnorm.monitor.statistics import resolve
from stabnorm.nn import PRepBN

LAYERS = ("a", "b", "c", "d")
STATISTICS = resolve(["token_std_mean", "amax", "grad_gain", "scale_jump"])


def calm(steps: int, seed: int = 0) -> Tensor:
    """Log-normal wobble of 5 % around a slow drift, as healthy runs have it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, len(LAYERS), len(STATISTICS), generator=generator) * 0.05
    drift = torch.linspace(0, 0.3, steps)[:, None, None]
    values = (noise + drift).exp()
    values[..., 3] = noise[..., 3].abs()
    return values


def run(values: Tensor, nonfinite: Tensor | None = None, chunk: int = 50, fading: tuple[str, ...] = ()) -> list[Alert]:
    detector = RobustDetector(STATISTICS, LAYERS, fading)
    tokens = torch.full(values.shape[:2], 100.0)
    nonfinite = torch.zeros(values.shape[:2], dtype=torch.bool) if nonfinite is None else nonfinite
    alerts = []
    for start in range(0, len(values), chunk):
        part = slice(start, start + chunk)
        alerts += detector.update(start, values[part], tokens[part], nonfinite[part])
    return alerts


def test_the_documented_bound_on_false_alarms_follows_from_the_calm_steps() -> None:
    text = " ".join((detect.__doc__ or "").split())
    (calm_steps,) = re.findall(r"In ([\d,]+) calm steps it raised no alert", text)
    (bound,) = re.findall(r"at most ([\d.]+) false alarms in 10,000 steps", text)
    exact = stats.binomtest(0, int(calm_steps.replace(",", "")), alternative="less").proportion_ci(0.95).high
    assert round(1e4 * exact, 2) == float(bound)


@pytest.mark.slow
def test_calm_runs_raise_nothing() -> None:
    assert sum(len(run(calm(2000, seed))) for seed in range(5)) == 0


def test_a_layer_that_leaves_its_past_is_named_at_once_and_once() -> None:
    values = calm(600)
    values[400:, 2, 0] *= 3
    (alert,) = run(values)
    assert (alert.step, alert.layer, alert.statistic) == (400, "c", "token_std_mean")
    assert alert.value == pytest.approx(float(values[400, 2, 0]))
    assert "times its usual" in alert.reason


def test_a_gradient_or_a_fluctuation_that_falls_raises_nothing() -> None:
    values = calm(900)
    values[400:, :, 2] *= 1e-3
    assert run(values) == []
    assert [statistic.upward for statistic in STATISTICS] == [False, False, True, False]


def test_the_gradients_of_a_norm_that_a_schedule_takes_away_raise_nothing() -> None:
    values = calm(900)
    values[400:, :, 2] *= torch.linspace(1, 1e6, 500)[:, None]
    assert run(values)[0].statistic == "grad_gain"
    assert run(values, fading=LAYERS) == []
    assert {alert.layer for alert in run(values, fading=LAYERS[1:])} == {"a"}
    values[400:, 2, 0] *= 3
    (alert,) = run(values, fading=LAYERS)
    assert (alert.layer, alert.statistic) == ("c", "token_std_mean")


def test_growth_of_two_percent_a_step_is_found_within_sixty_steps() -> None:
    values = calm(600)
    values[400:, 1, 1] *= 1.02 ** torch.arange(200)
    first = run(values)[0]
    assert (first.layer, first.statistic) == ("b", "amax")
    assert 400 < first.step < 460


def test_the_first_layer_in_depth_order_is_named_not_the_loudest() -> None:
    values = calm(600)
    values[400:, 1:, 0] *= torch.tensor([3.0, 3.5, 4.0])
    alert = run(values)[0]
    assert alert.layer == "b"
    assert alert.value > alert.threshold > 1
    assert "in 'd', further on" in alert.reason


def test_a_change_below_the_least_effect_stays_quiet_however_steady_the_past() -> None:
    values = torch.ones(600, len(LAYERS), len(STATISTICS)) * 0.1
    values[400:, 0, 0] *= 1.2  # infinitely many standard deviations, and 20 %
    assert run(values) == []


def test_a_non_finite_input_is_an_event_of_its_own_and_names_the_first_layer() -> None:
    values = calm(600)
    values[500, 1:] = torch.nan
    nonfinite = torch.isnan(values[..., 0])
    (alert,) = run(values, nonfinite)
    assert (alert.step, alert.layer, alert.statistic) == (500, "b", "nonfinite")


def test_a_non_finite_step_does_not_blind_the_detector_for_what_follows() -> None:
    values = calm(600)
    values[500] = torch.nan
    values[505:, 3, 0] *= 1000
    raised = [(alert.step, alert.layer, alert.statistic) for alert in run(values, torch.isnan(values[..., 0]))]
    assert raised == [(500, "a", "nonfinite"), (505, "d", "token_std_mean")]


def test_a_nan_without_a_non_finite_input_is_not_an_event() -> None:
    values = calm(400)
    values[:, 2, 2] = torch.nan  # a frozen gain: no gradient
    assert run(values) == []


def test_a_layer_that_runs_every_other_step_is_watched_all_the_same() -> None:
    values, steps = calm(1200), torch.arange(1200)
    values[steps % 2 == 1, 2] = torch.nan
    values[900:, 2, 1] *= 5
    assert [(a.layer, a.statistic) for a in run(values)] == [("c", "amax")]


def test_an_absolute_alarm_needs_no_past_and_cools_down() -> None:
    values = calm(400)
    values[3, 1, 3] = values[5, 1, 3] = values[250, 0, 3] = values[251, 1, 3] = 0.9
    assert [(alert.step, alert.layer, alert.statistic, alert.threshold) for alert in run(values)] == [
        (3, "b", "scale_jump", 0.5),
        (250, "a", "scale_jump", 0.5),
        (251, "b", "scale_jump", 0.5),
    ]


def test_an_alarm_that_stands_for_ever_mutes_no_other() -> None:
    values = calm(600)
    values[:, 0, 3] = 0.9
    values[300, 1, 3] = 0.9
    assert [(alert.step, alert.layer) for alert in run(values)] == [(0, "a"), (300, "b")]


def many_rows(steps: int, rows: int) -> Tensor:
    """One statistic of rows whose noise is as large as its scale, so that some score is always between 3 and 6."""
    noise = torch.randn(steps, rows, 1, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    return (0.1 * noise).exp()


def run_rows(values: Tensor) -> list[Alert]:
    detector = RobustDetector(resolve(["token_std_mean"]), [f"row{i}" for i in range(values.shape[1])])
    return detector.update(0, values, torch.full(values.shape[:2], 100.0), torch.zeros(values.shape[:2]).bool())


def test_rows_that_are_merely_noisy_mute_no_alarm_for_longer_than_what_was_away_lasts() -> None:
    values = many_rows(600, 400)
    values[300:303, 7] *= 5
    values[480:, 90] *= 5
    assert [(alert.step, alert.layer) for alert in run_rows(values)] == [(300, "row7"), (480, "row90")]


def test_of_more_rows_a_higher_score_is_needed() -> None:
    statistics = resolve(["token_std_mean"])
    bounds = [RobustDetector(statistics, [str(i) for i in range(rows)]).bound for rows in (1, 72, 720)]
    assert bounds == pytest.approx([6, 6, 7])
    together = [RobustDetector(statistics, [str(i) for i in range(360)]) for _ in range(2)]
    watched_together(together)
    assert [detector.bound for detector in together] == pytest.approx([7, 7])
    values = torch.ones(400, 720, 1)
    values[300:310, 3] = math.exp(0.05 * 6.5)  # 6.5 of the least scale
    assert run_rows(values) == []
    (alert,) = run_rows(values[:, :72])
    assert alert.layer == "row3"
    assert alert.threshold == pytest.approx(math.exp(0.05 * 6))


def test_what_moved_before_there_was_a_past_is_no_alarm_and_what_moves_later_is_one() -> None:
    values = calm(700)
    values[245:, 1, 0] *= 3
    assert run(values) == []
    values[600:, 1, 0] *= 3
    assert [(alert.step, alert.layer) for alert in run(values)] == [(600, "b")]


def test_a_rise_up_to_a_harmless_value_is_none_and_beyond_it_counts_from_there() -> None:
    detector = RobustDetector([Statistic("logit", floor=0.15, harmless=4.0)], LAYERS)
    values = torch.ones(600, 4, 1)
    values[300:, 0] = 9.0
    values[300:, 1] = 0.3  # a fall counts
    values[560:, 2] = 11.0
    tokens, nonfinite = torch.full((600, 4), 100.0), torch.zeros(600, 4, dtype=torch.bool)
    fall, rise = detector.update(0, values, tokens, nonfinite)
    assert (fall.step, fall.layer) == (301, "b")
    assert (rise.step, rise.layer, rise.usual) == (561, "c", 1.0)
    assert rise.threshold == pytest.approx(4 * math.exp(0.9))
    assert rise.score == pytest.approx(math.log(11 / 4) / 0.15, rel=1e-4)


def test_a_handful_of_tokens_raises_no_absolute_alarm() -> None:
    values = calm(50)
    values[20, 1, 3] = 0.9
    few = torch.full((50, 4), 8.0)
    assert RobustDetector(STATISTICS, LAYERS).update(0, values, few, torch.zeros(50, 4, dtype=torch.bool)) == []


def test_a_layer_that_starts_late_has_its_start_up_too() -> None:
    values = calm(800)
    values[:400, 2] = torch.nan
    values[400:420, 2, :3] *= 3
    assert run(values) == []


def test_an_infinite_value_counts_as_no_value_and_not_as_a_jump() -> None:
    values = calm(600)
    values[500, 1, :3] = torch.inf
    nonfinite = torch.isinf(values[..., 0])
    assert [(alert.step, alert.statistic) for alert in run(values, nonfinite)] == [(500, "nonfinite")]


def test_outliers_do_not_enter_the_past_unclipped() -> None:
    values = calm(700)
    values[300:360:10, 0, 1] *= 50
    values[500:, 0, 1] *= 3
    steps = [alert.step for alert in run(values)]
    assert steps[0] == 300
    assert steps[-1] in (500, 501)  # 501: it may have to hold for two steps


def test_the_chunks_of_the_flush_do_not_matter() -> None:
    values = calm(600)
    values[400:, 2, 0] *= 3
    values[20, 0, 3] = 2
    assert run(values, chunk=1) == run(values, chunk=7) == run(values, chunk=600)


def test_saved_in_the_middle_it_goes_on_to_the_same_alerts() -> None:
    values = calm(600)
    values[20, 0, 3] = 2
    values[320:, 2, 0] *= 3
    tokens, nonfinite = torch.full((600, 4), 100.0), torch.zeros(600, 4, dtype=torch.bool)
    whole = run(values)
    first, second = RobustDetector(STATISTICS, LAYERS), RobustDetector(STATISTICS, LAYERS)
    before = first.update(0, values[:313], tokens[:313], nonfinite[:313])
    second.load_state_dict(first.state_dict())
    after = second.update(313, values[313:], tokens[313:], nonfinite[313:])
    assert before + after == whole
    assert len(whole) == 2


def test_a_state_of_other_layers_is_refused() -> None:
    other = RobustDetector(STATISTICS, ("a", "b"))
    with pytest.raises(ValueError, match=r"for \(2, 3\) layers x statistics, this monitor watches \(4, 3\)"):
        RobustDetector(STATISTICS, LAYERS).load_state_dict(other.state_dict())


@pytest.mark.slow
def test_family_wise_false_alarms_on_heavy_tails_stay_below_one_in_ten_thousand_steps() -> None:
    generator = torch.Generator().manual_seed(3)
    steps = 10_000
    shape = (steps, len(LAYERS), len(STATISTICS))
    student = torch.distributions.StudentT(4.0)
    torch.manual_seed(3)
    values = (student.sample(shape) * 0.03).exp()
    values[..., 3] = torch.rand(shape[:2], generator=generator) * 0.1
    assert len(run(values, chunk=500)) <= 1


def test_an_alert_is_plain_data() -> None:
    alert = Alert(1, "a", "amax", math.inf, 2.0, "because")
    assert Alert(**alert.as_dict()) == alert


# -- another detector --------------------------------------------------------------------------------------------------


class Counts:
    """Raises an alert at every tenth value that it sees of a row's first statistic."""

    def __init__(self, statistics: Sequence[Statistic], rows: Sequence[str], fading: Collection[str] = ()) -> None:
        self.statistics, self.rows, self.fading = tuple(statistics), tuple(rows), tuple(fading)
        self.seen = 0

    def update(self, first_step: int, values: Tensor, tokens: Tensor, nonfinite: Tensor) -> list[Alert]:
        assert values.shape == (*tokens.shape, len(self.statistics))
        assert nonfinite.shape == tokens.shape == (len(values), len(self.rows))
        alerts = []
        for offset, row in enumerate(values):
            self.seen += 1
            if self.seen % 10 == 0:
                name, value = self.statistics[0].name, float(row[0, 0])
                alerts.append(Alert(first_step + offset, self.rows[0], name, value, 0.0, "the tenth"))
        return alerts

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"seen"}:
            raise ValueError(f"this is no state of Counts: {sorted(state)}")
        self.seen = state["seen"]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), PRepBN(8))


def steps(monitor: StabilityMonitor, model: nn.Module, count: int) -> None:
    with monitor:
        for _ in range(count):
            model(torch.randn(5, 4))
            monitor.step()


def test_another_detector_takes_the_place_of_ours_for_norms_and_companions() -> None:
    model = net()
    monitor = StabilityMonitor(model, ["amax"], flush_every=7, companions=["switch"], detector=Counts)
    steps(monitor, model, 25)
    names = [("amax", "1"), ("switch_readiness", "1")]
    assert [(a.step, a.statistic, a.layer) for a in monitor.alerts] == [(s, *n) for s in (9, 19) for n in names]
    detector = monitor._track.detector
    assert isinstance(detector, Counts)
    assert detector.fading == ("2",)  # its own norm is being switched off
    assert detector.rows == monitor.layers


def test_its_state_is_in_the_checkpoint() -> None:
    model = net()
    first, second = (StabilityMonitor(model, ["amax"], detector=Counts) for _ in range(2))
    steps(first, model, 7)
    second.load_state_dict(first.state_dict())
    steps(second, model, 7)
    assert [alert.step for alert in second.alerts] == [9]


def test_a_checkpoint_of_another_detector_is_said_and_this_one_starts_afresh(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    ours, other = StabilityMonitor(model, ["amax"]), StabilityMonitor(model, ["amax"], detector=Counts)
    steps(ours, model, 3)
    steps(other, model, 3)
    for one, state in ((ours, other.state_dict()), (other, ours.state_dict())):
        caplog.clear()
        one.load_state_dict(state)
        assert "the checkpoint's detector cannot be restored, so this one starts afresh" in caplog.text
        assert one.steps_done == 3


class Follows(Counts):
    """A detector that sees each step on the device, and raises an alert where its marks say so."""

    def step(self, values: Tensor, tokens: Tensor, nonfinite: Tensor) -> Tensor:
        return (values > 2.5).float()

    def alerts(self, first_step: int, values: Tensor, tokens: Tensor, nonfinite: Tensor, marks: Tensor) -> list[Alert]:
        return [Alert(first_step + i, "1", "amax", 0.0, 0.0, "") for i in marks[:, 0, 0].nonzero().ravel().tolist()]


def test_a_detector_that_follows_each_step_on_the_device_gets_its_marks_at_the_flush_also_after_a_resume() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    first, second = (StabilityMonitor(model, ["amax"], flush_every=5, detector=Follows) for _ in range(2))
    for monitor, sizes in ((first, [1, 9, 1]), (second, [9, 1])):
        with monitor:
            for size in sizes:
                model(torch.full((5, 8), float(size)))
                monitor.step()
            if monitor is first:
                second.load_state_dict(first.state_dict())
    assert [alert.step for alert in second.alerts] == [1, 3]


# -- what else ours promises -------------------------------------------------------------------------------------------


def test_steps_that_a_checkpoint_of_an_earlier_version_has_compared_are_not_compared_again() -> None:
    values = calm(600)
    values[20, 0, 3] = 2
    values[320:, 2, 0] *= 3
    tokens, nonfinite = torch.full((600, 4), 100.0), torch.zeros(600, 4, dtype=torch.bool)
    detector = RobustDetector(STATISTICS, LAYERS)
    marks = detector._marks(values.numpy())
    assert detector.alerts(0, values, tokens, nonfinite, marks) == run(values)


def test_calm_steps_that_pass_at_once_leave_the_state_that_one_by_one_they_leave() -> None:
    values = calm(700)
    values[5, 0, 3] = 2
    values[300:302, 1, 1] *= 9
    states = []
    for chunk in (700, 1):
        detector = RobustDetector(STATISTICS, LAYERS)
        for start in range(0, 700, chunk):
            part, hit = values[start : start + chunk], torch.zeros(chunk, 4, dtype=torch.bool)
            hit[:, 2] = torch.arange(start, start + chunk) == 650
            detector.update(start, part, torch.full((chunk, 4), 100.0), hit)
        states.append(detector.state_dict())
    whole, single = states
    assert (whole["steps"], whole["quiet"]) == (single["steps"], single["quiet"])
    assert whole["quiet"]["nonfinite"] == 51
    for name in ("quiet_alarms", "away", "from_zero"):
        torch.testing.assert_close(whole[name], single[name])


@pytest.mark.slow
def test_a_drift_that_the_fast_window_follows_is_seen_by_the_slow_one() -> None:
    noise = calm(4000)[:, :1, :1] / torch.linspace(0, 0.3, 4000).exp()[:, None, None]
    noise[2000:] *= 1.002 ** torch.arange(2000)[:, None, None]
    detector = RobustDetector(STATISTICS[:1], LAYERS[:1])
    alerts = detector.update(0, noise, torch.full((4000, 1), 64.0), torch.zeros(4000, 1, dtype=torch.bool))
    assert alerts
    assert 2100 < alerts[0].step < 3000


def test_growth_of_twenty_percent_a_step_is_found_at_once_though_a_mean_would_follow_it() -> None:
    values = calm(400)
    values[300:, 1, 1] *= 1.2 ** torch.arange(100)
    first = run(values)[0]
    assert (first.layer, first.statistic) == ("b", "amax")
    assert first.step <= 306


def test_a_metric_near_zero_that_wobbles_by_decades_raises_nothing() -> None:
    torch.manual_seed(0)
    values = calm(700)
    values[..., :3] = 1e-12 * torch.exp(torch.randn(700, 4, 3))
    values[100:110, :, :3] = 0  # which has no logarithm
    assert run(values) == []


def test_after_an_announced_change_the_new_level_is_learnt_within_64_steps() -> None:
    values = calm(700)
    values[400:, :, 0] *= 3
    tokens, nonfinite = torch.full((700, 4), 100.0), torch.zeros(700, 4, dtype=torch.bool)
    detector = RobustDetector(STATISTICS, LAYERS)
    assert detector.update(0, values[:400], tokens[:400], nonfinite[:400]) == []
    detector.forget()
    assert detector.update(400, values[400:500], tokens[400:500], nonfinite[400:500]) == []
    values[500:, 2, 0] *= 3
    (alert,) = detector.update(500, values[500:], tokens[500:], nonfinite[500:])
    assert (alert.step, alert.layer) == (500, "c")


def test_no_layer_is_named_whose_own_score_did_not_cross_the_bound() -> None:
    values = calm(600)
    values[400:, 1, 0] *= 1.32  # 5.5 robust standard deviations, at the least scale of 0.05
    values[400:, 3, 0] *= 1.6
    (alert,) = run(values)
    assert alert.layer == "d"
    assert alert.score > 6


def test_a_fault_of_the_backward_pass_is_named_at_its_last_layer() -> None:
    values = calm(600)
    values[400:, :3, 2] *= 5  # the gradients of "a" to "c"
    assert run(values)[0].layer == "c"


START = Statistic("update_ratio", start=0.1, advice="lower the learning rate")


@pytest.mark.parametrize(("hot", "raised"), [(4, [5]), (3, [5]), (2, [])])
def test_a_start_that_most_rows_pass_raises_one_alert_without_any_past(hot: int, raised: list[int]) -> None:
    values = torch.full((40, 4, 1), 0.005)
    values[5:, :hot] = 0.3
    detector = RobustDetector([START], LAYERS)
    alerts = detector.update(0, values, torch.full((40, 4), torch.inf), torch.zeros(40, 4, dtype=torch.bool))
    assert [alert.step for alert in alerts] == raised
    assert all(alert.kind == "start" for alert in alerts)


def test_a_matrix_that_starts_at_zero_is_no_hot_start() -> None:
    values = torch.full((40, 4, 1), 0.3)
    values[0] = torch.inf
    detector = RobustDetector([START], LAYERS)
    assert detector.update(0, values, torch.full((40, 4), torch.inf), torch.zeros(40, 4, dtype=torch.bool)) == []
