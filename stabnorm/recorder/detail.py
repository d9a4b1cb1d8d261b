"""What a dump says in numbers: the last steps before it, and for some steps after it the whole catalogue."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.recorder.dump import add_detail

Losses = Iterable[tuple[int, Tensor | float]]  # by step


def history_of(monitor: StabilityMonitor, steps: int, losses: Losses) -> dict[str, Any]:
    """Return every statistic of a monitor's last steps, and the loss, as arrays by name."""
    numbers, series = monitor.history_so_far()
    arrays: dict[str, Any] = {"@steps": numbers[-steps:].numpy()}
    arrays |= {name: values[-steps:].numpy() for name, values in series.items()}
    for track in monitor.companions.values():
        arrays[f"{track.name}/@rows"] = np.array(track.rows, str)
        _, series = monitor.history_so_far(track.name)
        arrays |= {f"{track.name}/{name}": values[-steps:].numpy() for name, values in series.items()}
    known = dict(losses)
    arrays["loss"] = np.array([float(known.get(int(step), np.nan)) for step in arrays["@steps"]], np.float32)
    return arrays


class Detail:
    """Records the whole catalogue for some steps after a dump, beside the run's own monitor.

    Args:
        monitor: the run's monitor.
        steps: for how many steps; 0 records nothing.
    """

    def __init__(self, monitor: StabilityMonitor, steps: int) -> None:
        self._monitor, self._steps = monitor, steps
        self._now: tuple[Path, StabilityMonitor, int] | None = None  # the dump, its monitor, and the step where it ends

    def begin(self, folder: Path) -> None:
        """Begin after a dump, unless the steps after an earlier one are not over."""
        if not self._steps or self._now is not None:
            return
        layers = [f"^{re.escape(name)}$" for name in self._monitor.layers]
        full = StabilityMonitor(self._monitor.model, "full", include=layers, flush_every=self._steps, sync=False)
        full.mute()  # its alerts are those of the other monitor
        full.steps_done = self._monitor.steps_done
        full.attach()
        self._now = (folder, full, self._monitor.steps_done + self._steps)

    def follow(self, losses: Losses) -> None:
        """End a step; after the last one, write them all."""
        if self._now is None:
            return
        _, full, until = self._now
        self._monitor.outputs.attempt("the steps after a dump are not recorded in full", full.step)
        if self._monitor.steps_done >= until:
            self.finish(losses)

    def finish(self, losses: Losses) -> None:
        """Write what there is."""
        if self._now is None:
            return
        (folder, full, _), self._now = self._now, None
        attempt = self._monitor.outputs.attempt
        attempt("a monitor cannot be taken off", full.detach)
        if full.steps_done:
            what = "the steps after a dump cannot be written"
            attempt(what, lambda: add_detail(folder, history_of(full, self._steps, losses)))
