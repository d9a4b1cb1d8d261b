"""Detectors, which raise alerts: absolute alarms, a robust z-score against the layer's own past, and NaN or infinity.

The z-score compares the logarithm of a value with median and median absolute deviation of the last 128 steps. Three
rules prevent false alarms in a healthy run. Each statistic has a least scale (`Statistic.floor`), and only a change of
six times this scale can raise an alert. Outliers are clipped before they enter the past. A score must hold for two
steps unless it is twice as high as the bound. The constants, and the choice of this detector instead of CUSUM, EWMA or
fitted quantiles, come from a study of 168 injected faults on three small models. In 35,256 calm steps it raised no
alert. So on such models there are, with 95 % confidence, at most 0.85 false alarms in 10,000 steps (exact binomial
bound). Other models may have more.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stabnorm._checks import check_all
from stabnorm._states import check_state, load_whole
from stabnorm.monitor.alerts import Alert as Alert
from stabnorm.monitor.baseline import ARMED, BOUND, CLIP, LEARNT, PAST, REFRESH
from stabnorm.statistic import Statistic

_QUIET = 100  # calm steps before an alert of the same kind can be raised again
_ENOUGH = 32  # fewest tokens in a step for an absolute alarm
_NEAR = 0.6  # share of the highest score: the alert names the first layer in depth order that reaches it


class Detector(Protocol):
    """Reads every step of every row, in order, and raises alerts. It runs on the host, at a flush.

    ``StabilityMonitor(model, detector=...)`` uses another detector than `RobustDetector`. The argument is a class, or a
    function that returns a detector. It is called with the statistics, the names of the rows, and the names of layers
    whose own norm a schedule removes. The monitor makes a detector for its norms and one for each companion. All that a
    detector remembers must be in its state, so that a resumed run raises the same alerts.

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


class RobustDetector:
    """The detector of this package: alarms, a robust z-score against each row's own past, and NaN or infinity.

    Args:
        statistics: the statistics in the columns of the values.
        layers: names of the rows, in depth order.
        fading: layers whose own norm a schedule removes. Their gradients vanish with it, so they raise no alert.
            Default: none.
    """

    def __init__(self, statistics: Sequence[Statistic], layers: Sequence[str], fading: Collection[str] = ()) -> None:
        check_all("statistics", statistics, Statistic, "a list of Statistic objects")
        check_all("layers", layers, str, "a list of names")
        check_all("fading", fading, str, "a list of names")
        self._statistics, self._layers = tuple(statistics), tuple(layers)
        self._alarmed = [i for i, s in enumerate(self._statistics) if s.alarm is not None]
        self._watched = [i for i, s in enumerate(self._statistics) if s.floor is not None]
        self._alarms = _host([self._statistics[i].alarm for i in self._alarmed])
        gradient = [self._statistics[i].axis == "gradient" for i in self._watched]
        gradients = torch.tensor(gradient, dtype=torch.bool, device="cpu")
        fades = torch.tensor([layer in fading for layer in self._layers], dtype=torch.bool, device="cpu")
        self._exempt = fades[:, None] & gradients
        self._floors = _host([self._statistics[i].floor for i in self._watched])
        shape = (len(self._layers), len(self._watched))
        self._past = _host(torch.nan).repeat(PAST, *shape)
        self._center, self._scale, self._before = (_host(value).repeat(shape) for value in (0.0, 1.0, 0.0))
        self._seen = _host(0).repeat(shape)  # steps with a value, for each layer, because a layer may start late
        self._steps = 0
        self.worst_score = 0.0  # of the steps of the last update
        # Calm steps to wait before the same alert can be raised again. An alarm may last, and mutes only itself.
        self._quiet = {"nonfinite": 0, "past": 0}
        self._quiet_alarms = _host(0).repeat(len(self._layers), len(self._alarmed))

    @property
    def compared(self) -> bool:
        """Whether some layer has been compared with its own past."""
        return bool((self._seen > ARMED).any())

    def update(self, first_step: int, values: Tensor, tokens: Tensor, nonfinite: Tensor) -> list[Alert]:
        """Read the next steps and return their alerts, at most one of a kind in each step; see `Detector.update`."""
        values = values.double()
        self.worst_score = 0.0
        alerts = []
        for offset in range(len(values)):
            row, seen = values[offset], tokens[offset]
            score = self._score(row[:, self._watched])
            self.worst_score = max(self.worst_score, float(score.max()) if score.numel() else 0.0)
            raised = [
                self._nonfinite(nonfinite[offset] & (seen > 0)),
                self._alarm(row[:, self._alarmed], seen),
                self._off_its_past(score, row),
            ]
            alerts += [
                Alert(first_step + offset, self._layers[layer], name, value, threshold, reason)
                for layer, name, value, threshold, reason in filter(None, raised)
            ]
        return alerts

    def _score(self, row: Tensor) -> Tensor:
        """Return by how many robust standard deviations each statistic is off its past in two successive steps."""
        log = row.log()
        known = torch.isfinite(log)
        if self._steps >= LEARNT and (self._steps - LEARNT) % REFRESH == 0:
            center = self._past.nanmedian(0).values
            spread = 1.4826 * (self._past - center).abs().nanmedian(0).values
            self._center, self._scale = center, torch.maximum(spread, self._floors)
        off = (log - self._center) / self._scale
        learning = ~known | torch.isnan(off) | (self._seen < LEARNT)
        score = torch.where(learning | self._exempt, 0, off).abs()
        clipped = torch.where(learning, log, self._center + off.clamp(-CLIP, CLIP) * self._scale)
        self._past[self._steps % PAST] = torch.where(known, clipped, torch.nan)
        held = torch.maximum(torch.minimum(score, self._before), score / 2)
        self._before = score
        armed = self._seen >= ARMED
        self._seen += known
        self._steps += 1
        return torch.where(armed, held, 0)

    def _may_raise(self, kind: str, firing: bool, calm: bool) -> bool:
        raise_it = firing and self._quiet[kind] == 0
        if firing:
            self._quiet[kind] = _QUIET
        elif calm and self._quiet[kind]:
            self._quiet[kind] -= 1
        return raise_it

    def _nonfinite(self, hit: Tensor) -> tuple[int, str, float, float, str] | None:
        firing = bool(hit.any())
        if not self._may_raise("nonfinite", firing, not firing):
            return None
        layer = int(hit.int().argmax())
        reason = (
            "its input holds a NaN or an infinity, and it is the first layer in depth order that does: look at what "
            "feeds it, and at this step's batch"
        )
        return layer, "nonfinite", float("nan"), 0.0, reason

    def _alarm(self, row: Tensor, tokens: Tensor) -> tuple[int, str, float, float, str] | None:
        # A non-finite value is another kind of alert, and statistics of few tokens vary too much.
        over = (row > self._alarms) & torch.isfinite(row) & (tokens >= _ENOUGH)[:, None]
        firing = over & (self._quiet_alarms == 0)
        self._quiet_alarms = torch.where(over, _QUIET, (self._quiet_alarms - 1).clamp(min=0))
        if not bool(firing.any()):
            return None
        layer = int(firing.any(1).int().argmax())
        column = int(firing[layer].int().argmax())
        statistic = self._statistics[self._alarmed[column]]
        others = int(firing[:, column].sum()) - 1
        reason = statistic.advice
        if others:
            reason += f" ({others} more layer{'s'[: others > 1]} at the same step)"
        return layer, statistic.name, float(row[layer, column]), float(self._alarms[column]), reason

    def _off_its_past(self, score: Tensor, row: Tensor) -> tuple[int, str, float, float, str] | None:
        best = float(score.max()) if score.numel() else 0.0
        if not self._may_raise("past", best > BOUND, best < BOUND / 2):
            return None
        layer = int((score.amax(1) >= _NEAR * best).int().argmax())
        column = int(score[layer].argmax())
        statistic = self._statistics[self._watched[column]]
        value, usual = float(row[layer, self._watched[column]]), float(self._center[layer, column].exp())
        bound = BOUND if float(score[layer, column]) > BOUND else _NEAR * best
        reach = float((bound * self._scale[layer, column]).exp())
        threshold = usual * reach if value > usual else usual / reach
        loudest = self._layers[int(score.amax(1).argmax())]
        others = "" if loudest == self._layers[layer] else f" ({best:.2g} in {loudest!r}, further on)"
        reason = (
            f"it is {value / usual:.3g} times its usual {usual:.3g}, {float(score[layer, column]):.2g} robust standard "
            f"deviations off the last {PAST} steps{others}: look at what feeds this layer, and at what changed just "
            "before this step"
        )
        return layer, statistic.name, value, threshold, reason

    def state_dict(self) -> dict[str, Any]:
        """Return baselines and waiting times as tensors and plain containers."""
        return {
            "past": self._past.clone(),
            "center": self._center.clone(),
            "scale": self._scale.clone(),
            "before": self._before.clone(),
            "seen": self._seen.clone(),
            "steps": self._steps,
            "quiet": dict(self._quiet),
            "quiet_alarms": self._quiet_alarms.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: when it was saved for other layers or statistics; nothing is loaded then.
        """
        check_state(state, "RobustDetector", ())
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"the saved state has {sorted(state)}, and is that of another detector")
        saved, own = tuple(getattr(state["past"], "shape", ())), tuple(self._past.shape)
        if saved != own:
            raise ValueError(
                f"the saved baselines are for {saved[1:]} layers x statistics, this monitor watches {own[1:]}"
            )
        load_whole(self, self._load, state)

    def _load(self, state: dict[str, Any]) -> None:
        self._past, self._center = state["past"].clone(), state["center"].clone()
        self._scale, self._before = state["scale"].clone(), state["before"].clone()
        self._seen, self._steps = state["seen"].clone(), int(state["steps"])
        self._quiet, self._quiet_alarms = dict(state["quiet"]), state["quiet_alarms"].clone()


def _host(values: Any) -> Tensor:
    """Return a float64 tensor on the CPU, independent of torch's defaults."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")
