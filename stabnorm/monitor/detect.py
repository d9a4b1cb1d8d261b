"""Detectors, which raise alerts: fixed bounds, a robust z-score against the row's own past, and NaN or infinity.

The z-score compares the logarithm of a value with median and median absolute deviation of the last 128 steps, and of a
sample of the last 1024 steps, which sees a slow drift. Six rules prevent false alarms in a healthy run. Each statistic
has a least scale (`Statistic.floor`), and only a change of six times this scale can raise an alert. Outliers are
clipped before they enter the past. A score must hold for two steps unless it is twice as high as the bound. Of
gradients and of fluctuations only a rise counts. The bound is 6 for 72 series, and higher by one for ten times as many.
A series that has left its past before it could be compared is silent until it has come to rest. The constants, and the
choice of this detector instead of CUSUM, EWMA or fitted quantiles, come from a study of 168 injected faults on three
small models. In 35,256 calm steps it raised no alert. So on such models there are, with 95 % confidence, at most 0.85
false alarms in 10,000 steps (exact binomial bound). Other models may have more.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stabnorm._checks import check_all
from stabnorm._states import check_state, load_whole
from stabnorm.monitor.alerts import Alert, Departure, Kind
from stabnorm.monitor.baseline import ARMED, BOUND
from stabnorm.monitor.windows import FAST, SLOW, Window
from stabnorm.statistic import Statistic

_QUIET = 100  # calm steps before an alert of the same kind can be raised again
_ENOUGH = 32  # fewest tokens in a step for an absolute alarm
_MOST = 0.75  # share of the rows that must cross the bound of a start
_SERIES = 72  # that were watched where the bound was chosen
_NEAR = 0.6  # share of the highest score: the alert names the first layer in depth order that reaches it


class Detector(Protocol):
    """Reads every step of every row, in order, and raises alerts. It runs on the host, at a flush.

    ``StabilityMonitor(model, detector=...)`` uses another detector than `RobustDetector`. The argument is a class, or a
    function that returns a detector. It is called with the statistics, the names of the rows, and the names of layers
    whose own norm a schedule removes. The monitor makes a detector for its norms and one for each companion. All that a
    detector remembers must be in its state, so that a resumed run raises the same alerts.

    Four methods more are used if a detector has them. ``take_departures()`` returns every `Departure` since its last
    call, and ``forget()`` is called when a change of the training was announced. A detector that must see each step on
    the device has ``step(values, tokens, nonfinite)``, which is called at every step with the step's tensors, reads
    nothing from the device, and returns a tensor of marks; ``alerts(first_step, values, tokens, nonfinite, marks)`` is
    then called at the flush instead of `update`.

    >>> import stabnorm
    >>> class TooLarge:
    ...     def __init__(self, statistics, rows, fading=(), bound=10.0):
    ...         self.statistics, self.rows, self.bound = statistics, rows, bound
    ...
    ...     def update(self, first_step, values, tokens, nonfinite):
    ...         too_large = (values > self.bound).nonzero().tolist()
    ...         return [
    ...             Alert(first_step + i, self.rows[j], self.statistics[k].name, values[i, j, k].item(), self.bound, "")
    ...             for i, j, k in too_large
    ...         ]
    ...
    ...     def state_dict(self):
    ...         return {}
    ...
    ...     def load_state_dict(self, state): ...
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    >>> with stabnorm.StabilityMonitor(model, ["amax"], detector=TooLarge) as monitor:
    ...     for size in 1, 40, 2:
    ...         _ = model(size * torch.ones(5, 8))
    ...         monitor.step()
    >>> [(alert.step, alert.layer, alert.value) for alert in monitor.alerts]
    [(1, '0', 40.0)]
    """

    def update(self, first_step: int, values: Tensor, tokens: Tensor, nonfinite: Tensor) -> list[Alert]:
        """Read the next steps and return their alerts, in the order of the steps.

        Args:
            first_step: the step of row 0.
            values: ``[steps, rows, statistics]`` on the CPU; NaN if a row has no value.
            tokens: ``[steps, rows]``, number of valid tokens of the layer; infinite if the rows are not norms.
            nonfinite: ``[steps, rows]`` bool, whether the layer's input had a NaN or an infinity.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain containers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: the state is of other rows, other statistics or another detector; nothing is loaded then.
        """


MakeDetector = Callable[[Sequence[Statistic], Sequence[str], Collection[str]], Detector]


Row = npt.NDArray[np.float32]


class _Found(NamedTuple):
    """What is wrong with one row at one step."""

    row: int
    statistic: str
    value: float
    threshold: float
    reason: str
    kind: Kind
    usual: float = math.nan
    score: float = math.nan


class RobustDetector:
    """The detector of this package: fixed bounds, a robust z-score against each row's own past, and NaN or infinity.

    Args:
        statistics: the statistics in the columns of the values.
        layers: names of the rows, in depth order.
        fading: layers whose own norm a schedule removes. Their gradients vanish with it, so they raise no alert.
            Default: none.

    >>> from stabnorm.statistic import Statistic
    >>> detector = RobustDetector([Statistic("loss", floor=0.1)], ["run"])
    >>> losses = torch.ones(300)
    >>> losses[280:] = 3.0
    >>> (alert,) = detector.update(0, losses[:, None, None], torch.full((300, 1), 64), torch.zeros(300, 1).bool())
    >>> alert.step, alert.layer, alert.value, alert.usual
    (281, 'run', 3.0, 1.0)
    """

    def __init__(self, statistics: Sequence[Statistic], layers: Sequence[str], fading: Collection[str] = ()) -> None:
        check_all("statistics", statistics, Statistic, "a list of Statistic objects")
        check_all("layers", layers, str, "a list of names")
        check_all("fading", fading, str, "a list of names")
        self._statistics, self._layers = tuple(statistics), tuple(layers)
        self._alarmed = [i for i, s in enumerate(self._statistics) if s.alarm is not None]
        self._starting = [i for i, s in enumerate(self._statistics) if s.start is not None]
        self._watched = [i for i, s in enumerate(self._statistics) if s.floor is not None]
        self._alarms = np.array([self._statistics[i].alarm for i in self._alarmed], np.float32)
        self._gradients = np.array([self._statistics[i].axis == "gradient" for i in self._watched], bool)
        fades = np.array([layer in fading for layer in self._layers], bool)
        self._negligible = np.array([self._statistics[i].negligible for i in self._watched], np.float32)
        exempt = (fades[:, None] & self._gradients).ravel()
        floors = np.tile(np.array([self._statistics[i].floor for i in self._watched], np.float32), len(self._layers))
        upward = np.tile(np.array([self._statistics[i].upward for i in self._watched], bool), len(self._layers))
        drifts = np.tile(np.array([self._statistics[i].drifts for i in self._watched], bool), len(self._layers))
        with np.errstate(divide="ignore"):
            harmless = np.log(np.array([self._statistics[i].harmless for i in self._watched], np.float32))
        beyond = np.tile(harmless, len(self._layers))
        self._windows = [
            Window(FAST, floors, upward, exempt, beyond), Window(SLOW, floors, upward, exempt | drifts, beyond),
        ]  # fmt: skip
        self.series = len(floors)  # that are compared with their past
        self.bound = _bound_of(self.series)
        # An alarm may last, and mutes only itself: calm steps until it is raised again.
        self.steps = 0
        self._quiet = {"nonfinite": 0, "past": 0, "start": 0}
        crosses = np.array([self._statistics[i].crosses for i in self._alarmed], bool)
        self._quiet_alarms = np.tile(np.where(crosses, _QUIET, 0), (len(self._layers), 1)).astype(np.int64)
        self._away = np.zeros((len(self._layers), len(self._watched)), bool)  # series that are out of their usual range
        self._from_zero = np.zeros(len(self._layers), bool)  # rows whose first value was infinite
        self._departures: list[Departure] = []
        self.compared = False  # whether some row has been compared with its own past
        self.worst_score = 0.0  # of the steps that were read last
        self.usual = np.zeros((0, *self._away.shape), np.float32)  # their medians of the last 128 steps

    def among(self, series: int) -> None:
        """Set the bound, because so many series are watched in all, by this detector and those beside it."""
        self.bound = _bound_of(series)

    # -- a flush -------------------------------------------------------------------------------------------------------

    def update(self, first_step: int, values: Tensor, tokens: Tensor, nonfinite: Tensor) -> list[Alert]:
        """Read the next steps and return their alerts, at most one of a kind in each step; see `Detector.update`."""
        if not len(values):
            return []
        return self.alerts(first_step, values, tokens, nonfinite, self._marks(values.float().numpy()))

    def _marks(self, values: Row) -> Tensor:
        """Return scores (NaN if not compared), medians and scales, ``[steps, 3, rows, watched statistics]``."""
        shape = (3, len(values), *self._away.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(np.maximum(values[..., self._watched], self._negligible)).reshape(len(values), -1)
        fast, slow = (window.follow(logs) for window in self._windows)
        self.usual = np.exp(fast[1]).reshape(shape[1:])
        further = slow[0] > np.nan_to_num(fast[0])
        return torch.from_numpy(np.where(further, slow, fast).reshape(shape)).movedim(0, 1)

    def forget(self) -> None:
        """Learn again what is usual, within 64 steps, because something was changed on purpose."""
        for window in self._windows:
            window.forget()

    def alerts(self, first_step: int, values: Tensor, tokens: Tensor, nonfinite: Tensor, marks: Tensor) -> list[Alert]:
        """Return the alerts of steps that were compared with their past, in their order.

        Args:
            first_step: the step of row 0.
            values: ``[steps, rows, statistics]`` on the CPU.
            tokens: ``[steps, rows]``.
            nonfinite: ``[steps, rows]`` bool.
            marks: scores, medians and scales, ``[steps, 3, rows, watched statistics]``. A checkpoint of an earlier
                version has them.
        """
        values, self.worst_score = values.float(), 0.0
        known = torch.isfinite(marks[:, 0])
        self.compared = self.compared or bool(known.any())
        score = marks[:, 0].nan_to_num(0).numpy()
        best = score.reshape(len(score), -1).max(1, initial=0.0)
        self.worst_score = float(best.max(initial=0.0))
        alerts = []
        numbers, seen = values.numpy(), tokens.numpy()
        hit = nonfinite.numpy() & (seen > 0)
        bounded = numbers[..., self._alarmed]
        # A non-finite value is another kind of alert, and statistics of few tokens vary too much.
        over = (bounded > self._alarms) & np.isfinite(bounded) & (seen >= _ENOUGH)[..., None]
        starts = bool(self._starting) and self.steps < ARMED
        if not (starts or hit.any() or over.any() or self._away.any() or self.worst_score > self.bound):
            self._pass_calm_steps(len(values))
            return []
        for offset in range(len(values)):
            found = [
                self._nonfinite(hit[offset]),
                self._alarm(bounded[offset], over[offset]),
                self._start(numbers[offset]),
                self._off_its_past(
                    first_step + offset, score[offset], float(best[offset]), numbers[offset], marks[offset]
                ),
            ]
            self.steps += 1
            alerts += [Alert(first_step + offset, self._layers[one.row], *one[1:]) for one in found if one is not None]
        return alerts

    def take_departures(self) -> list[Departure]:
        """Return every departure since the last call."""
        departures, self._departures = self._departures, []
        return departures

    def _pass_calm_steps(self, count: int) -> None:
        """Do at once what so many steps do in which nothing fires and nothing is away."""
        self.steps += count
        self._quiet |= {kind: max(self._quiet[kind] - count, 0) for kind in ("nonfinite", "past")}
        self._quiet_alarms = np.maximum(self._quiet_alarms - count, 0)

    def _may_raise(self, kind: str, firing: bool, calm: bool) -> bool:
        raise_it = firing and self._quiet[kind] == 0
        if firing:
            self._quiet[kind] = _QUIET
        elif calm and self._quiet[kind]:
            self._quiet[kind] -= 1
        return raise_it

    def _nonfinite(self, hit: npt.NDArray[np.bool_]) -> _Found | None:
        firing = bool(hit.any())
        if not self._may_raise("nonfinite", firing, not firing):
            return None
        reason = (
            "its input holds a NaN or an infinity, and it is the first layer in depth order that does: look at what "
            "feeds it, and at this step's batch"
        )
        return _Found(int(hit.argmax()), "nonfinite", math.nan, 0.0, reason, "nonfinite")

    def _alarm(self, row: Row, over: npt.NDArray[np.bool_]) -> _Found | None:
        firing = over & (self._quiet_alarms == 0)
        self._quiet_alarms = np.where(over, _QUIET, np.maximum(self._quiet_alarms - 1, 0))
        if not firing.any():
            return None
        layer = int(firing.any(1).argmax())
        column = int(firing[layer].argmax())
        statistic = self._statistics[self._alarmed[column]]
        others = int(firing[:, column].sum()) - 1
        more = f" ({others} more layer{'s'[: others > 1]} at the same step)" if others else ""
        value, bound = float(row[layer, column]), float(self._alarms[column])
        return _Found(layer, statistic.name, value, bound, statistic.advice + more, "bound")

    def _start(self, row: Row) -> _Found | None:
        """Check bounds that hold for most rows of a healthy start, as long as there is no past."""
        for column in self._starting if self.steps < ARMED else ():
            statistic, values = self._statistics[column], row[:, column]
            assert statistic.start is not None
            self._from_zero |= np.isinf(values)  # a matrix that starts at zero changes by a large part, as it should
            values = values[~self._from_zero]
            over = values > statistic.start
            firing = bool(over.any()) and int(over.sum()) >= _MOST * len(values)
            if self._may_raise("start", firing, not firing):
                worst = int(np.where(self._from_zero, 0, row[:, column]).argmax())
                share = f"{int(over.sum())} of {len(values)} rows pass {statistic.start:g} at the start"
                reason = f"{share}, which a healthy start does not: {statistic.advice}"
                return _Found(worst, statistic.name, float(row[worst, column]), statistic.start, reason, "start")
        return None

    def _off_its_past(self, step: int, score: Row, best: float, row: Row, marks: Tensor) -> _Found | None:
        if best > self.bound or self._away.any():
            new = (score > self.bound) & ~self._away
            self._away = (self._away | new) & (score >= self.bound / 2)
            self._departures += [self._departure(step, at, row, marks) for at in np.argwhere(new).tolist()]
        # Of a thousand series some score is always high. What has to end is what was away.
        if not self._may_raise("past", best > self.bound, not self._away.any()):
            return None
        near = (score > self.bound) & (score >= _NEAR * best)
        forward = near[:, ~self._gradients].any(1)
        # A fault reaches the layers behind it; in the backward pass it reaches those before it.
        layer = int(forward.argmax()) if forward.any() else int(np.flatnonzero(near.any(1))[-1])
        columns = np.where(self._gradients & forward.any(), 0, score[layer])
        off = self._departure(step, (layer, int(columns.argmax())), row, marks)
        reach = math.exp(self.bound * float(marks[2, layer, int(columns.argmax())]))
        harmless = self._statistics[self._watched[int(columns.argmax())]].harmless
        threshold = max(off.usual, harmless) * reach if off.value > off.usual else off.usual / reach
        loudest = self._layers[int(score.max(1).argmax())]
        others = "" if loudest == off.layer else f" ({best:.2g} in {loudest!r}, further on)"
        reason = (
            f"it is {off.value / off.usual:.3g} times its usual {off.usual:.3g}, {off.score:.2g} robust standard "
            f"deviations off its past{others}: look at what feeds this layer, and at what changed just before this step"
        )
        return _Found(layer, off.statistic, off.value, threshold, reason, "past", off.usual, off.score)

    def _departure(self, step: int, at: Sequence[int], row: Row, marks: Tensor) -> Departure:
        layer, column = at
        score, usual, value = marks[0, layer, column], marks[1, layer, column].exp(), row[layer, self._watched[column]]
        name, gradient = self._statistics[self._watched[column]].name, bool(self._gradients[column])
        numbers = float(value), float(usual), float(score)
        return Departure(step, self._layers[layer], name, *numbers, gradient, bound=self.bound)

    # -- resume --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return pasts and waiting times as tensors and plain containers."""
        fast, slow = self._windows
        return {
            "fast": fast.state_dict(len(self._layers)),
            "slow": slow.state_dict(len(self._layers)),
            "steps": self.steps,
            "quiet": dict(self._quiet),
            "quiet_alarms": torch.from_numpy(self._quiet_alarms.copy()),
            "away": torch.from_numpy(self._away.copy()),
            "from_zero": torch.from_numpy(self._from_zero.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: when it was saved for other layers or statistics; nothing is loaded then.
        """
        check_state(state, "RobustDetector", ())
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"the saved state has {sorted(state)}, and is that of another detector")
        saved, own = tuple(getattr(state["away"], "shape", ())), self._away.shape
        if saved != own:
            raise ValueError(f"the saved baselines are for {saved} layers x statistics, this monitor watches {own}")
        load_whole(self, self._load, state)

    def _load(self, state: Mapping[str, Any]) -> None:
        for window, name in zip(self._windows, ("fast", "slow"), strict=True):
            window.load_state_dict(state[name])
        self.steps, self._quiet = int(state["steps"]), dict(state["quiet"])
        self._quiet_alarms, self._away, self._from_zero = (
            state[name].cpu().numpy().copy() for name in ("quiet_alarms", "away", "from_zero")
        )
        self.compared = bool((self._windows[0].seen > ARMED).any())


def watched_together(detectors: Iterable[Detector]) -> None:
    """Tell each of the detectors of a training how many series all of them compare with their past."""
    robust = [detector for detector in detectors if isinstance(detector, RobustDetector)]
    series = sum(detector.series for detector in robust)
    for detector in robust:
        detector.among(series)


def _bound_of(series: int) -> float:
    """Return the bound of so many series.

    In the study behind it a bound that was higher by 1 had a tenth of the false alarms, so ten times as many series
    have as many with it.
    """
    return BOUND + math.log10(max(1.0, series / _SERIES))
