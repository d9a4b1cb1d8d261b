"""`Waiting`: let a schedule wait, and reach 0 when it would have."""

from collections.abc import Mapping, Sequence
from typing import Any

from stabnorm._states import check_one_each


class Waiting:
    """Changes the lam of a schedule so that it can wait for some steps.

    A layer that waits keeps its lam, but no more than twice what the schedule asks for. Afterwards lam is that of the
    schedule times a constant, so that it neither jumps nor comes to 0 later.

    Args:
        layers: number of layers.

    >>> waiting = Waiting(1)
    >>> waiting.hold([0.8], until=3)
    >>> [round(*waiting.apply(step, [lam]), 2) for step, lam in enumerate([0.8, 0.7, 0.6, 0.5, 0.25, 0.0])]
    [0.8, 0.8, 0.8, 0.67, 0.33, 0.0]
    """

    def __init__(self, layers: int) -> None:
        self._factors = [1.0] * layers
        self._held: list[float] | None = None
        self._until = 0

    def hold(self, lam: Sequence[float], until: int) -> None:
        """Keep these lam until a step."""
        self._held, self._until = list(lam), until

    def apply(self, step: int, planned: Sequence[float]) -> list[float]:
        """Return the lam of a step, from the schedule's."""
        if self._held is not None and step < self._until:
            for row, (held, plan) in enumerate(zip(self._held, planned, strict=True)):
                self._factors[row] = min(held / plan, 2.0) if plan > 0 else 1.0
        else:
            self._held = None
        return [min(1.0, plan * factor) for plan, factor in zip(planned, self._factors, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain containers."""
        return {"factors": list(self._factors), "held": self._held, "until": self._until}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        held = state["held"]
        for values in (state["factors"], state["factors"] if held is None else held):
            check_one_each(values, self._factors)
        self._factors, self._until = list(map(float, state["factors"])), int(state["until"])
        self._held = None if held is None else list(map(float, held))
