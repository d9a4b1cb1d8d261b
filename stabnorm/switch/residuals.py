"""`ResidualFeed` passes affine residuals from a monitor to a gate, some steps late and without a sync."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stabnorm._models.async_copy import AsyncCopy
from stabnorm._models.ranks import ranks
from stabnorm.monitor.catalogue.affinity import AFFINE_RESIDUAL
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.switch.gate import MEASURE_EVERY, AffineGate


def watches(monitor: StabilityMonitor, layers: Sequence[str]) -> bool:
    """Whether the monitor measures the affine residual of all these layers, on the batches of all processes."""
    if ranks() > 1 and monitor.sync is not True:
        return False
    return AFFINE_RESIDUAL in [statistic.name for statistic in monitor.statistics] and set(layers) <= set(
        monitor.layers
    )


class ResidualFeed:
    """Take the affine residuals of every `MEASURE_EVERY`-th step from a monitor, and pass them to a gate.

    An asynchronous copy of the residuals to the host starts when the monitor ends the step. `deliver` is called some
    steps later, so it does not wait. The result does not depend on the speed of the device: the lam of step t depends
    on residuals of steps up to 4 (t // 4) - 4.

    With several processes the residual is that of the whole batch, so all processes decide alike.

    Args:
        monitor: a monitor for which `watches` is true.
        gate: the gate, whose layers are watched.
    """

    def __init__(self, monitor: StabilityMonitor, gate: AffineGate) -> None:
        self._gate, self._monitor = gate, monitor
        self._column = [statistic.name for statistic in monitor.statistics].index(AFFINE_RESIDUAL)
        self._rows = [monitor.layers.index(layer) for layer in gate.layers]
        self._pending: tuple[int, AsyncCopy] | None = None  # the step, and its residuals
        monitor.listeners.append(self._listen)

    def close(self) -> None:
        """Take no more residuals; those that were not delivered can still be saved."""
        if self._listen in self._monitor.listeners:
            self._monitor.listeners.remove(self._listen)

    def _listen(self, step: int, statistics: Tensor) -> None:
        if step % MEASURE_EVERY == 0:
            self._pending = step, AsyncCopy(statistics[:, self._column][self._rows])

    def deliver(self) -> None:
        """Pass the last residuals to the gate, if there are new ones."""
        if self._pending is not None:
            (step, copy), self._pending = self._pending, None
            (residuals,) = copy.wait()
            self._gate.observe(step, residuals.double().numpy())

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals that were not delivered yet."""
        if self._pending is None:
            return {}
        step, copy = self._pending
        (residuals,) = copy.wait()
        return {"step": step, "residuals": residuals.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        if state:
            self._pending = int(state["step"]), AsyncCopy(torch.tensor(state["residuals"]))
