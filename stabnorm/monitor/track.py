"""`Track`: every statistic of every row at every step, from the device to history, alerts and record.

A monitor has one track of its norms, and one for each companion: heads, matrices, ... All share its steps and flushes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stabnorm._log import logger
from stabnorm._models.async_copy import AsyncCopy
from stabnorm.monitor.alerts import Alert, Departure
from stabnorm.monitor.detect import Detector
from stabnorm.monitor.history import History
from stabnorm.monitor.outputs import Guard
from stabnorm.monitor.record import Block
from stabnorm.monitor.rows import RowLayout
from stabnorm.monitor.scalars import SCALARS, joined
from stabnorm.statistic import Statistic

_HISTORY_BYTES = 64 << 20


class Track:
    """The measurements of some rows, which stay on the device until a flush.

    Args:
        rows: names of the rows.
        statistics: the statistics of each row.
        detector: the detector, which reads the rows on the host.
        flush_every: number of steps between two flushes.
        flush: the monitor's method.
        companion: name of the companion that has these rows. Default: the rows are the norms.
        beside: other parts of a row, see `RowLayout`. Default: nothing.
    """

    def __init__(
        self,
        rows: Sequence[str],
        statistics: Sequence[Statistic],
        detector: Detector,
        flush_every: int,
        flush: Callable[[], None],
        *,
        companion: str = "",
        beside: Mapping[str, int] | None = None,
    ) -> None:
        self.rows, self.statistics, self.name = tuple(rows), tuple(statistics), companion
        self.layout = RowLayout([statistic.name for statistic in statistics], beside)
        self.detector = detector
        self._flush = flush
        self._guard = Guard()
        self._waiting: list[tuple[Tensor, ...]] = []  # of each step since the last flush its row, and its scalars
        self._in_flight: tuple[int, AsyncCopy] | None = None  # the first step, and what is copied
        self._flush_every = flush_every
        self._history = self._empty_history()
        self.not_finite: npt.NDArray[np.float32] | None = None  # of the scalars of the steps received last

    def _empty_history(self) -> History:
        return History(len(self.rows), self.layout.width, self._flush_every, _HISTORY_BYTES)

    @property
    def waiting(self) -> int:
        """The number of steps since the last flush."""
        return len(self._waiting)

    def history(self) -> dict[str, Tensor]:
        """Flush the monitor, and return every statistic of every step, ``[steps, rows]``.

        NaN where a row had nothing to measure. Bounded in memory: of a very long run the last 64 MiB are kept.
        """
        self._flush()
        return self._series(self._history.values())

    def so_far(self, steps_done: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return steps and history without a flush, with the steps that none has received yet; this waits for them."""
        steps, values = self._history.steps(), self._history.values()
        if unflushed := self.unflushed():
            values = torch.cat([values, unflushed[0]])
            steps = torch.cat([steps, torch.arange(steps_done - len(unflushed[0]), steps_done, device="cpu")])
        return steps, self._series(values)

    def _series(self, values: Tensor) -> dict[str, Tensor]:
        names = (*self.layout.statistics, *({"tokens"} & self.layout.beside.keys()))
        return {name: self.layout.part(values, name) for name in names}

    def history_steps(self) -> Tensor:
        """Return the optimizer steps of the rows of `history()`, counted from 0."""
        self._flush()
        return self._history.steps()

    def add(self, row: Tensor, *scalars: Tensor) -> None:
        """Add a step.

        Args:
            row: ``[rows, columns]``, see `RowLayout.pack`.
            *scalars: the parts of the step's scalars, see `scalars_of`, or nothing.
        """
        self._waiting.append((row, self._marks(row), *scalars))

    def _marks(self, row: Tensor) -> Tensor:
        """Let the detector follow a step on the device; without marks it reads the step at the flush."""
        nothing = row.new_empty(0)
        step = getattr(self.detector, "step", None)
        if step is None:
            return nothing
        marks = self._guard.attempt("the detector raises no alerts", step, *self._seen(row))
        return nothing if marks is None else marks

    def _seen(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a detector reads of rows ``[..., rows, columns]``: statistics, tokens, and what is not finite."""
        if self.layout.beside:
            tokens, nonfinite = (self.layout.part(rows, name) for name in ("tokens", "nonfinite"))
        else:  # a companion's row stands for many tokens; alerts about what is not finite come from the norms
            tokens, nonfinite = rows.new_full(rows.shape[:-1], torch.inf), rows.new_zeros(rows.shape[:-1])
        return self.layout.statistics_of(rows), tokens, nonfinite > 0

    def send(self, steps_done: int) -> None:
        """Start to copy the waiting steps to the host."""
        if self._waiting:
            self._in_flight = steps_done - len(self._waiting), AsyncCopy(*self._stacked())
            self._waiting.clear()

    def _stacked(self) -> Iterator[Tensor]:
        for parts in zip(*self._waiting, strict=True):
            yield torch.stack([part.to(parts[-1].device) for part in parts])  # the model may have moved in between

    def receive(self) -> tuple[Block, list[Alert]] | None:
        """Return the steps that have arrived and their alerts; None if nothing was sent."""
        if self._in_flight is None:
            return None
        (first_step, copy), self._in_flight = self._in_flight, None
        rows, marks, *scalars = _with_joined_scalars(copy)
        self._history.add(first_step, rows)
        alerts = self._detect(first_step, rows, marks)
        names = [*self.layout.statistics, *(name for name in self.layout.beside if name != "nonfinite")]
        series = {name: self.layout.part(rows, name).numpy() for name in names}
        for values in scalars:
            known = {name: values[:, i].numpy() for i, name in enumerate(SCALARS) if not values[:, i].isnan().all()}
            self.not_finite = known.pop("nonfinite", None)
            series.update(known)
        return Block(first_step, self.rows, series, companion=self.name), alerts

    def _detect(self, first_step: int, rows: Tensor, marks: Tensor) -> list[Alert]:
        read: Callable[..., list[Alert]] = self.detector.update
        seen: tuple[Any, ...] = (first_step, *self._seen(rows))
        if marks.numel():
            read, seen = self.detector.alerts, (*seen, marks)  # type: ignore[attr-defined]  # it has made the marks
        alerts = self._guard.attempt("the detector raises no alerts", read, *seen) or []
        return [dataclasses.replace(alert, companion=self.name) for alert in alerts] if self.name else alerts

    def take_departures(self) -> list[Departure]:
        """Return what left its usual range since the last call; nothing if the detector does not tell.

        A detector may have a method of this name, see `RobustDetector.take_departures`.
        """
        take = getattr(self.detector, "take_departures", None)
        departed: list[Departure] = take() if take is not None else []
        return [departure._replace(companion=self.name) for departure in departed]

    def unflushed(self) -> tuple[Tensor, ...]:
        """Return rows, marks and scalars that no flush has received yet, on the host, ``[steps, ...]``.

        () if none exist.
        """
        copies = [] if self._in_flight is None else [self._in_flight[1]]
        if self._waiting:
            copies.append(AsyncCopy(*self._stacked()))
        parts = map(_with_joined_scalars, copies)
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def restore(
        self, steps_done: int, rows: Tensor | None = None, marks: Tensor | None = None, *scalars: Tensor
    ) -> None:
        """Clear the history, and give the next flush the rows that no flush had received.

        Args:
            steps_done: the number of steps before the next one.
            rows: ``[steps, rows, columns]``, the last of these steps. Default: none.
            marks: what the detector made of them. Default: it follows them again.
            *scalars: their scalars.
        """
        self._history.clear()
        if rows is not None and len(rows):
            marks = self._marks_of(rows) if marks is None else marks
            self._in_flight = steps_done - len(rows), AsyncCopy(rows, marks, *scalars)

    def _marks_of(self, rows: Tensor) -> Tensor:
        return torch.stack([self._marks(row) for row in rows])

    def load_detector(self, state: Any) -> bool:
        """Restore the detector; one that cannot read the state starts afresh, with a warning, and returns False."""
        try:
            self.detector.load_state_dict(state)
        except ValueError as error:
            logger.warning("the checkpoint's detector cannot be restored, so this one starts afresh: %s", error)
            return False
        return True

    def no_rows(self) -> Tensor:
        """Return an empty tensor of rows, ``[0, rows, columns]``."""
        return torch.empty(0, len(self.rows), self.layout.width, dtype=torch.float32, device="cpu")


def _with_joined_scalars(copy: AsyncCopy) -> tuple[Tensor, ...]:
    """Return rows, marks and, if there are any, scalars, as they have arrived."""
    rows, marks, *scalars = copy.wait()
    return (rows, marks, joined(*scalars)) if scalars else (rows, marks)
