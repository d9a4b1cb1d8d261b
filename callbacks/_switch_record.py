"""Write a switch into the record: lam and branch gap of every layer at every step, and the gate's decisions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from stabnorm.monitor.async_copy import AsyncCopy
from stabnorm.monitor.record import Block, RecordWriter
from stabnorm.switch.gate import Change

FLUSH_EVERY = 50  # steps


class SwitchRecord:
    """Writes blocks of steps to record writers, and the mean lam to loggers.

    Args:
        writers: the writers of the run's record; this class does not close them.
        loggers: the Trainer's loggers.
        layers: names of the layers in the record, in order.
        switched: names of the layers that have a lam.
    """

    def __init__(
        self, writers: Sequence[RecordWriter], loggers: Sequence[Any], layers: Sequence[str], switched: Sequence[str]
    ) -> None:
        self._writers, self._loggers, self._layers = list(writers), list(loggers), tuple(layers)
        self._columns = [self._layers.index(layer) for layer in switched]
        self._first, self._lam, self._gaps = 0, list[list[float]](), list[tuple[int, AsyncCopy]]()

    def add(self, row: int, lam: list[float], gap: Tensor | None) -> None:
        """Add a finished step."""
        if not self._lam:
            self._first = row
        self._lam.append(lam)
        if gap is not None:
            self._gaps.append((row, AsyncCopy(gap)))
        if len(self._lam) == FLUSH_EVERY:
            self.flush()

    def change(self, row: int, change: Change) -> None:
        """Write a decision of the gate."""
        for writer in self._writers:
            writer.write_event("hold", row, change._asdict())

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
        for writer in self._writers:
            writer.write_block(block)
        for logger in self._loggers:
            separator = getattr(logger, "group_separator", "/")
            logger.log_metrics({f"stability{separator}lam": float(np.nanmean(lam[-1]))}, step=block.last_step)
        self._lam, self._gaps = [], []
