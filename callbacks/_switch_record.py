"""Write a switch into the record: lam and branch gap of every layer at every step, and the gate's decisions."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabnorm._models.async_copy import AsyncCopy
from stabnorm.monitor.outputs import Outputs
from stabnorm.monitor.record import Block, RecordWriter
from stabnorm.switch.gate import Change


class SwitchRecord:
    """Writes blocks of steps to record writers, and the mean lam to loggers.

    Args:
        outputs: what calls the writers.
        writers: the writers of the run's record; this class does not close them.
        loggers: the Trainer's loggers.
        layers: names of the layers in the record, in order.
        switched: names of the layers that have a lam.
        flush_every: number of steps between two flushes, that of the monitor.
    """

    def __init__(
        self,
        outputs: Outputs,
        writers: Sequence[RecordWriter],
        loggers: Sequence[Any],
        layers: Sequence[str],
        switched: Sequence[str],
        flush_every: int,
    ) -> None:
        self._outputs, self._flush_every = outputs, flush_every
        self._writers, self._loggers, self._layers = list(writers), list(loggers), tuple(layers)
        self._columns = [self._layers.index(layer) for layer in switched]
        self._first, self._lam, self._gaps = 0, list[list[float]](), list[tuple[int, AsyncCopy]]()

    def add(self, row: int, lam: list[float], gap: Tensor | None) -> None:
        """Add a finished step."""
        if self._lam and row != self._first + len(self._lam):
            self.flush()  # a block has contiguous steps
        if not self._lam:
            self._first = row
        self._lam.append(lam)
        if gap is not None:
            self._gaps.append((row, AsyncCopy(gap)))
        if len(self._lam) >= self._flush_every:
            self.flush()

    def change(self, row: int, change: Change) -> None:
        """Write a decision of the gate."""
        self._outputs.write_event(self._writers, "hold", row, change._asdict())

    def flush(self) -> None:
        """Write the steps since the last flush."""
        if not self._lam:
            return
        lam, gap = np.full((2, len(self._lam), len(self._layers)), np.nan, np.float32)
        lam[:, self._columns] = self._lam
        for row, copy in self._gaps:
            (measured,) = copy.wait()
            gap[row - self._first, self._columns] = measured.numpy()
        block = Block(self._first, self._layers, {"lam": lam, "branch_gap": gap})
        self._outputs.write_block(self._writers, block)
        for logger in self._loggers:
            separator = getattr(logger, "group_separator", "/")
            mean = {f"stability{separator}lam": float(np.nanmean(lam[-1]))}
            what = f"{type(logger).__name__} does not take lam"
            self._outputs.attempt(what, functools.partial(logger.log_metrics, mean, step=block.last_step))
        self._lam, self._gaps = [], []

    def state_dict(self) -> dict[str, Any]:
        """Return the steps since the last flush, as plain containers; the earlier ones are in the record."""
        gaps = [[row, copy.wait()[0].tolist()] for row, copy in self._gaps]
        return {"first": self._first, "lam": [list(lam) for lam in self._lam], "gaps": gaps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the steps that were not flushed when the state was saved."""
        self._first, self._lam = int(state["first"]), [list(lam) for lam in state["lam"]]
        self._gaps = [(int(row), AsyncCopy(torch.tensor(gap, device="cpu"))) for row, gap in state["gaps"]]
