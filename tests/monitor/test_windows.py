"""Many steps at once give the scores that a plain loop over steps and series gives in float64."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from stabnorm.monitor.windows import FAST, SLOW, Span, Window

SMALL = Span(every=3, size=8, refresh=2, learnt=4, armed=6, again=2)


class Plain:
    """One series, step by step, in Python's own numbers."""

    def __init__(self, span: Span, floor: float, upward: bool, exempt: bool) -> None:
        self.span, self.floor, self.upward, self.exempt = span, floor, upward, exempt
        self.values: list[float] = [math.nan] * span.size
        self.center, self.scale, self.before, self.held, self.seen, self.steps = 0.0, 1.0, 0.0, math.nan, 0, 0

    def step(self, value: float) -> tuple[float, float, float]:
        number, rest = divmod(self.steps, self.span.every)
        self.steps += 1
        if not rest:
            self._take(number, value)
        return self.held, self.center, self.scale

    def _take(self, number: int, value: float) -> None:
        if number >= self.span.learnt and (number - self.span.learnt) % self.span.refresh == 0:
            self.center = middle(self.values)
            spread = 1.4826 * middle([abs(one - self.center) for one in self.values])
            self.scale = math.nan if math.isnan(spread) else max(spread, self.floor)
            if sum(not math.isnan(one) for one in self.values) < self.span.refresh:
                self.seen = min(self.seen, self.span.armed - self.span.again)
        off, known = (value - self.center) / self.scale, math.isfinite(value)
        learning = not known or math.isnan(off) or self.seen < self.span.learnt
        kept = value if learning else self.center + min(max(off, -4), 4) * self.scale
        self.values[number % self.span.size] = kept if known else math.nan
        now = 0.0 if learning or self.exempt or (self.upward and off < 0) else abs(off)
        score = max(min(now, self.before), now / 2)
        unknown = self.seen < self.span.armed or (math.isnan(self.held) and score >= 3)
        self.held = math.nan if unknown else score
        self.before, self.seen = now, self.seen + known

    def forget(self) -> None:
        self.values, self.center, self.held = [math.nan] * self.span.size, math.nan, math.nan
        self.seen = min(self.seen, self.span.armed - self.span.again)


def middle(values: list[float]) -> float:
    known = sorted(value for value in values if not math.isnan(value))
    return known[(len(known) - 1) // 2] if known else math.nan


def logs(steps: int) -> npt.NDArray[np.float32]:
    """Eight series: calm, outliers, holes, one that starts late, one without values, constant, drifting, a long gap."""
    random = np.random.default_rng(3)
    values = 0.1 * random.standard_normal((steps, 8))
    values[random.random(steps) < 0.02, 1] *= 60
    values[:, 2] = np.where(random.random(steps) < 0.2, random.choice([np.nan, np.inf, -np.inf], steps), values[:, 2])
    values[: steps // 5, 3] = values[:, 4] = np.nan
    values[:, 5] = -2
    values[steps // 2 :, 6] += 0.01 * np.arange(steps - steps // 2)
    values[2 * steps // 5 : 4 * steps // 5, 7] = np.nan
    return values.astype(np.float32)


@pytest.mark.parametrize(("span", "steps"), [(FAST, 420), (SLOW, 900), (SMALL, 200)])
def test_scores_medians_and_scales_are_those_of_a_plain_loop_however_the_steps_are_cut(span: Span, steps: int) -> None:
    floors = np.array([0.05, 0.05, 0.1, 0.05, 0.05, 0.02, 0.05, 0.05], np.float32)
    upward, exempt = np.arange(8) % 3 == 1, np.arange(8) == 6
    window = Window(span, floors, upward, exempt)
    plain = [Plain(span, *one) for one in zip(floors.tolist(), upward.tolist(), exempt.tolist(), strict=True)]
    values, begin, random = logs(steps), 0, np.random.default_rng(1)
    while begin < steps:
        if begin <= 3 * steps // 4 < begin + 33:
            window.forget()
            for one in plain:
                one.forget()
        part = values[begin : begin + int(random.integers(1, 33))]
        expected = np.array([[one.step(value) for one, value in zip(plain, row, strict=True)] for row in part.tolist()])
        np.testing.assert_allclose(window.follow(part), np.moveaxis(expected, 2, 0), rtol=1e-5, atol=2e-6)
        other = Window(span, floors, upward, exempt)
        other.load_state_dict(window.state_dict(1))
        window, begin = other, begin + len(part)


def test_no_step_changes_nothing() -> None:
    window = Window(FAST, np.full(2, 0.1, np.float32), np.zeros(2, bool))
    window.follow(logs(60)[:, :2])
    before = window.state_dict(2)
    assert window.follow(logs(60)[:0, :2]).shape == (3, 0, 2)
    after = window.state_dict(2)
    assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)


def test_after_a_gap_as_long_as_the_window_a_few_values_are_no_past() -> None:
    values = np.full((800, 1), np.nan, np.float32)
    values[:300], values[500:] = 0.0, np.minimum(np.arange(300), 40)[:, None] * 0.025  # x2.7 within 40 steps
    window = Window(FAST, np.full(1, 0.1, np.float32), np.zeros(1, bool))
    scores = window.follow(values)[0, :, 0]
    assert np.isnan(scores[500:564]).all()
    assert np.isfinite(scores[580:]).all()
    assert np.nanmax(scores[564:]) < 6
