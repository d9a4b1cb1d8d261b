"""What a detector raises: an `Alert`, and the departures of single layers from their past, of which onsets are made."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from stabnorm.monitor.baseline import BOUND

Kind = Literal["past", "bound", "start", "nonfinite"]
TRAINING = "training"  # the row of series that belong to no layer: loss and norm of the gradient


@dataclass(frozen=True)
class Alert:
    """A warning about one layer at one step.

    Attributes:
        step: optimizer step, counted from 0 like the loggers' x axis.
        layer: name of the layer; of a companion's row, such as a matrix; or "training" for the loss and the gradient's
            norm, which belong to no layer.
        statistic: name of the statistic, or "nonfinite".
        value: value of the statistic of this layer at this step.
        threshold: the bound that it crossed.
        reason: one sentence that says what happened and where to look.
        kind: "past" if the value left its usual range, "bound" if it crossed a fixed bound, "start" if most rows
            crossed a bound that holds at a start, "nonfinite" for a NaN or an infinity. Default: "past".
        usual: what was usual for this layer before; NaN if the alert needs no past. Default: NaN.
        score: by how many robust standard deviations the value is off; NaN if the alert needs no past. Default: NaN.
        companion: name of the companion that has the row. Default: "", the row is a norm, or "training".
    """

    step: int
    layer: str
    statistic: str
    value: float
    threshold: float
    reason: str
    kind: Kind = "past"
    usual: float = math.nan
    score: float = math.nan
    companion: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers, for records and checkpoints."""
        return asdict(self)


class Departure(NamedTuple):
    """One statistic of one row leaves its usual range. It returns when its score falls below half of the bound.

    Attributes:
        step: the optimizer step.
        layer: name of the row.
        statistic: name of the statistic.
        value: the value at this step.
        usual: what was usual before.
        score: by how many robust standard deviations it is off; always above the bound.
        gradient: whether the statistic is one of the gradient, which a fault reaches in reverse depth order.
        companion: name of the companion that has the row. Default: "", the row is a norm, or "training".
        bound: the score at which alerts begin. Default: 6.
    """

    step: int
    layer: str
    statistic: str
    value: float
    usual: float
    score: float
    gradient: bool = False
    companion: str = ""
    bound: float = BOUND
