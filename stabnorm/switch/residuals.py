"""`ResidualFeed`: a monitor's affine residuals for a gate, some steps late and without a wait for the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stabnorm._models.ranks import ranks
from stabnorm.monitor.async_copy import AsyncCopy
from stabnorm.monitor.catalogue.affinity import AFFINE_RESIDUAL
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.switch.gate import MEASURE_EVERY, AffineGate


def watches(monitor: StabilityMonitor, layers: Sequence[str]) -> bool:
    """Whether the monitor has the affine residual of all these layers, and of the batches of all processes."""
    if ranks() > 1 and monitor.sync is not True:
        return False
    return AFFINE_RESIDUAL in [statistic.name for statistic in monitor.statistics] and set(layers) <= set(
        monitor.layers
    )


class ResidualFeed:
    """Takes the affine residuals of every `MEASURE_EVERY`-th step from a monitor and hands them to a gate when asked.

    A step's residuals start for the host when the monitor ends the step. Asked at the end of every `MEASURE_EVERY`-th
    step, the feed has had some steps' time, and waits for nothing; and it is always the same step's residuals that
    decide, however fast the device is: the lam of step t rests on residuals up to step 4 (t // 4) - 4.

    With several processes the residual is that of the whole batch, the same on all, so all decide alike.

    Args:
        monitor: one for which `watches` holds.
        gate: its layers are those to watch.
    """

    def __init__(self, monitor: StabilityMonitor, gate: AffineGate) -> None:
        self._gate, self._monitor = gate, monitor
        self._column = [statistic.name for statistic in monitor.statistics].index(AFFINE_RESIDUAL)
        self._rows = [monitor.layers.index(layer) for layer in gate.layers]
        self._pending: tuple[int, AsyncCopy] | None = None  # the step, and its residuals
        monitor.listeners.append(self._listen)

    def close(self) -> None:
        """Take no more; what was not handed over yet can still be saved."""
        if self._listen in self._monitor.listeners:
            self._monitor.listeners.remove(self._listen)

    def _listen(self, step: int, statistics: Tensor) -> None:
        if step % MEASURE_EVERY == 0:
            self._pending = step, AsyncCopy(statistics[:, self._column][self._rows])

    def deliver(self) -> None:
        """Hand over what is there."""
        if self._pending is not None:
            (step, copy), self._pending = self._pending, None
            (residuals,) = copy.wait()
            self._gate.observe(step, residuals.double().numpy())

    def state_dict(self) -> dict[str, Any]:
        """What was measured and not handed over yet."""
        if self._pending is None:
            return {}
        step, copy = self._pending
        (residuals,) = copy.wait()
        return {"step": step, "residuals": residuals.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        if state:
            self._pending = int(state["step"]), AsyncCopy(torch.tensor(state["residuals"]))
