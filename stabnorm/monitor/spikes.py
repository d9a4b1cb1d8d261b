"""Spikes: a step that is far above the past, known before the optimizer applies it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.optim import Optimizer

from stabnorm.monitor.baseline import BOUND
from stabnorm.monitor.windows import FAST, Window
from stabnorm.monitor.words import number, times

SPIKE_BOUND = 2 * BOUND  # at which the detector, too, takes a single step for an alarm
LASTS = 5  # spikes in a row, after which a level is a new one
_FLOOR = 0.1  # as of the loss, the gradient's norm and the largest input in the detector
_NEAR = 0.6  # share of the highest score: the first layer in depth order that reaches it is named
_BESIDE = ("the loss", "the norm of the gradient")


class Spike(NamedTuple):
    """What is far above its past.

    Attributes:
        layer: the norm; "" for the loss or the gradient.
        place: its number among the values.
        reason: a sentence that says it.
    """

    layer: str
    place: int
    reason: str


class Spikes:
    """Compares loss, norm of the gradient, and largest input of each norm with their own last 128 steps.

    A spike is 12 robust standard deviations, which are at least 0.1 in log units, above the median, so at least 3.3
    times as large. Nothing is compared before the 256th step. After five spikes in a row the level is accepted, and
    what is usual is learnt again. Each optimizer has a past of its own.

    Args:
        layers: the norms, in depth order.

    >>> spikes = Spikes(["norm"])
    >>> for _ in range(300):
    ...     assert spikes.judge([], [1.0, 2.0, 5.0]) is None
    >>> spikes.judge([], [1.1, 2.2, 5000.0]).reason
    "the largest input of the norm 'norm' is 5,000, ×1,000 its usual 5; a spike begins at ×3.32"
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        self._windows: dict[int, Window] = {}  # by the number of the optimizers
        self._optimizers: list[tuple[int, ...]] = []  # those that have asked, in this order
        self.in_a_row = 0

    def judge(self, optimizers: Sequence[Optimizer], values: Sequence[float]) -> Spike | None:
        """Take in a step, and return what is far above its past; None if nothing is.

        Args:
            optimizers: those that would step.
            values: loss, norm of the gradient, and largest input of each norm; NaN or 0 where there is none.
        """
        who = tuple(map(id, optimizers))
        if who not in self._optimizers:
            self._optimizers.append(who)
        window = self._windows.setdefault(self._optimizers.index(who), self._new())
        with np.errstate(divide="ignore", invalid="ignore"):
            (held,), (center,), (scale,) = window.follow(np.log(np.array([values], np.float32)))
        scores = np.where(np.isnan(held), 0, window.before)
        if scores.max() <= SPIKE_BOUND:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        layers = scores[len(_BESIDE) :]
        if layers.max(initial=0) > SPIKE_BOUND:
            place = len(_BESIDE) + int((layers >= _NEAR * layers.max()).argmax())
        else:
            place = int(scores.argmax())
        beside = place < len(_BESIDE)
        name = "" if beside else self.layers[place - len(_BESIDE)]
        what = _BESIDE[place] if beside else f"the largest input of the norm {name!r}"
        usual, bound = math.exp(center[place]), math.exp(SPIKE_BOUND * scale[place])
        far = times(values[place] / usual, values[place] / usual)
        reason = (
            f"{what} is {number(values[place])}, {far} its usual {number(usual)}; a spike begins at ×{number(bound)}"
        )
        return Spike(name, place, reason)

    def _new(self) -> Window:
        series = len(_BESIDE) + len(self.layers)
        return Window(FAST, np.full(series, _FLOOR, np.float32), np.ones(series, bool))

    @property
    def lasts(self) -> bool:
        """Whether there have been so many spikes in a row that it is a new level."""
        return self.in_a_row > LASTS

    def forget(self) -> None:
        """Learn again what is usual, within 64 steps."""
        self.in_a_row = 0
        for window in self._windows.values():
            window.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain containers."""
        return {"in_a_row": self.in_a_row, "windows": {n: window.state_dict(1) for n, window in self._windows.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.in_a_row = int(state["in_a_row"])
        self._windows = {int(place): self._new() for place in state["windows"]}
        for place, window in self._windows.items():
            window.load_state_dict(state["windows"][place])
