"""What is usual for each layer: the detector's own baseline, computed again from a record, with numpy alone.

`stabnorm.monitor.detect.RobustDetector` compares the logarithm of a value with the median of the last 128 steps, in
units of a robust scale. A page shows the same numbers for every step and layer. No alarm is raised here: alerts are
read from the record. A test compares both computations.
"""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Steps = npt.NDArray[np.integer[Any]]
_Float = TypeVar("_Float", bound=np.floating[Any])

PAST = 128  # steps in the window
REFRESH = 16  # steps between two looks at median and scale
LEARNT = 48  # steps before they are looked at first
ARMED = 256  # steps before a score may raise an alert: a start-up is not calm
BOUND = 6.0  # robust standard deviations, of as many series as the study behind it watched
CLIP = 4.0
DEFAULT_FLOOR = 0.05  # of a statistic that the detector does not watch


class Baseline:
    """Follows one statistic of all layers, and keeps what was usual at every step.

    Args:
        layers: number of layers.
        floor: smallest scale of the score, in log units. Default: 0.05.
        negligible: a value below it counts as this one. Default: 0.

    Example:
        >>> baseline = Baseline(1)
        >>> baseline.extend(np.r_[np.ones(300), 2.0][:, None])
        >>> float(baseline.usual(np.array([300]))[0, 0]), baseline.steps
        (1.0, 301)
    """

    def __init__(self, layers: int, floor: float | None = None, negligible: float = 0.0) -> None:
        self.steps, self._negligible = 0, np.float32(negligible)
        self._floor = DEFAULT_FLOOR if floor is None else floor
        self._past = np.full((layers, PAST), np.nan, np.float32)
        self._deviations = np.empty_like(self._past)
        self._missing = np.ones(PAST, np.bool_)  # whether any layer has no value at a step of the window
        self._seen = np.zeros(layers, np.int64)
        self._least = 0
        self._center, self._scale = np.full(layers, np.nan, np.float32), np.full(layers, np.nan, np.float32)
        self._centers, self._scales = [self._center], [self._scale]  # of each stretch between two refreshes
        self._learnt_at, self._armed_at = np.full((2, layers), np.iinfo(np.int64).max)

    def extend(self, values: Floats) -> None:
        """Take in the next steps, ``[steps, layers]``."""
        logs = self._logs(values)
        known = np.isfinite(logs)
        complete: npt.NDArray[np.bool_] = np.all(known, axis=1)
        begin = 0
        while begin < len(logs):
            if self.steps >= LEARNT and (self.steps - LEARNT) % REFRESH == 0:
                self._refresh()
            ahead = LEARNT - self.steps if self.steps < LEARNT else REFRESH - (self.steps - LEARNT) % REFRESH
            end = min(len(logs), begin + ahead)
            self._add(logs[begin:end], None if complete[begin:end].all() else known[begin:end])
            begin = end

    def _logs(self, values: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            logs: Floats = np.log(np.maximum(values.astype(np.float32), self._negligible))
        return logs

    def _add(self, logs: Floats, known: npt.NDArray[np.bool_] | None) -> None:
        """Take in steps of one stretch, whose median and scale are the same; None: all values are known."""
        count = len(logs)
        if known is None and self._least > ARMED:  # the usual case, which must be fast
            kept = np.clip(logs, self._center - CLIP * self._scale, self._center + CLIP * self._scale)
            self._seen += count
        else:
            seen = self._seen + (np.arange(count)[:, None] if known is None else np.cumsum(known, axis=0) - known)
            with np.errstate(invalid="ignore"):
                clipped = np.clip(logs, self._center - CLIP * self._scale, self._center + CLIP * self._scale)
            kept = np.where((seen < LEARNT) | np.isnan(clipped), logs, clipped)
            if known is not None:
                kept = np.where(known, kept, np.nan)
            for at, enough in ((self._learnt_at, seen >= LEARNT), (self._armed_at, seen >= ARMED)):
                first = self.steps + enough.argmax(0)
                at[...] = np.where(enough.any(0), np.minimum(at, first), at)
            self._seen = seen[-1] + (1 if known is None else known[-1])
            self._least = int(self._seen.min(initial=ARMED + 1))
        # A stretch never wraps around: both the window and the first stretch are whole numbers of refreshes.
        place = self.steps % PAST
        self._past[:, place : place + count] = kept.T
        self._missing[place : place + count] = False if known is None else ~known.all(1)
        self.steps += count

    def _refresh(self) -> None:
        complete = not self._missing.any()
        self._center = lower_median(self._past, complete=complete)
        np.subtract(self._past, self._center[:, None], out=self._deviations)
        np.abs(self._deviations, out=self._deviations)
        spread = np.float32(1.4826) * lower_median(self._deviations, complete=complete)
        self._scale = np.maximum(spread, np.float32(self._floor))
        self._centers.append(self._center)
        self._scales.append(self._scale)

    def usual(self, at: Steps) -> Floats:
        """Return the usual value at some steps, counted from the first one: ``[len(at), layers]``, NaN if unknown."""
        return np.exp(self._known(self._centers, at))

    def scale(self, at: Steps) -> Floats:
        """Return the robust standard deviation of the logarithm at some steps, ``[len(at), layers]``."""
        return self._known(self._scales, at)

    def scores(self, values: Floats, at: Steps) -> Floats:
        """Return how many robust standard deviations the values of some steps are off; NaN while it learns."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self._logs(values) - self._known(self._centers, at)) / self.scale(at)

    def armed_at(self) -> Steps:
        """Return for each layer the first step at which a score may raise an alert, or a number beyond all steps."""
        return self._armed_at.copy()

    def cells(self, at: Steps) -> tuple[Floats, Floats]:
        """Return the usual value and the scale of each layer at a step of its own, ``[n, layers]`` both, as ``at``."""
        layer = np.arange(at.shape[1])
        stretch = _stretch(at)
        usual, scale = (np.asarray(known)[stretch, layer] for known in (self._centers, self._scales))
        unknown = at < self._learnt_at
        return np.where(unknown, np.nan, np.exp(usual)), np.where(unknown, np.nan, scale)

    def _known(self, of_stretches: list[Floats], at: Steps) -> Floats:
        known: Floats = np.where(at[:, None] < self._learnt_at, np.nan, np.asarray(of_stretches)[_stretch(at)])
        return known


def _stretch(at: Steps) -> Steps:
    """Return which stretch between two refreshes a step lies in."""
    return np.where(at < LEARNT, 0, (at - LEARNT) // REFRESH + 1)


def lower_median(values: npt.NDArray[_Float], *, complete: bool | None = None) -> npt.NDArray[_Float]:
    """Return the lower median of each row of what is not NaN, as torch's `nanmedian`; NaN where there is no value.

    Args:
        values: ``[rows, values]``.
        complete: whether it is known that no value is NaN, which is faster. Default: it is looked for.
    """
    if not np.isnan(values).any() if complete is None else complete:
        middle = (values.shape[1] - 1) // 2
        return np.partition(values, middle, axis=1)[:, middle]
    ordered = np.sort(values, axis=1)  # NaN last
    count = (~np.isnan(ordered)).sum(1)
    medians: npt.NDArray[_Float] = ordered[np.arange(len(ordered)), np.maximum(count - 1, 0) // 2]
    return medians
