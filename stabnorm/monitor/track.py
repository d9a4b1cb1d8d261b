"""`Track`: every statistic of every row at every step, from the device to history, alerts and record.

A monitor has one track of its norms, and one for each companion: heads, matrices, ... All share its steps and flushes.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stabnorm._log import logger
from stabnorm._models.async_copy import AsyncCopy
from stabnorm.companions.companion import Companion, NormMoments, StepLoss
from stabnorm.monitor.alerts import Alert, Departure
from stabnorm.monitor.detect import Detector, MakeDetector
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


class CompanionTrack(Track):
    """The track of a companion.

    Attributes:
        watch: the companion at work on the model.
    """

    def __init__(
        self,
        companion: Companion,
        model: nn.Module,
        detector: MakeDetector,
        flush_every: int,
        flush: Callable[[], None],
    ) -> None:
        self.watch = companion.watch(model)
        rows, statistics = self.watch.rows, companion.statistics
        super().__init__(
            rows, statistics, detector(statistics, rows, ()), flush_every, flush, companion=companion.name
        )  # fmt: skip
        self.computes_loss = companion.computes_loss
        self._make_detector = detector
        self._complaints: set[str] = set()

    def step(self, layers: Sequence[str], norms: NormMoments, loss: StepLoss) -> None:
        """End a step: turn what was gathered into a row.

        Args:
            layers: the names of the monitor's norms.
            norms: what the monitor has of them.
            loss: the loss of the step.
        """
        self.watch.see_norms(layers, norms)
        self.watch.see_loss(loss)
        sums = self.watch.take()
        self._follow_rows()
        values = torch.stack([statistic.compute(sums, None).to(torch.float32) for statistic in self.statistics], -1)
        self.add(self.layout.pack(values, {}))
        self.watch.discard()

    def receive(self) -> tuple[Block, list[Alert]] | None:
        """Return what has arrived, and warn once about what could not be measured."""
        self._follow_rows()
        arrived = super().receive()
        if arrived is not None:
            values = torch.from_numpy(np.stack([arrived[0].series[name] for name in self.layout.statistics], -1))
            complaint = self.watch.complaint(values)
            if complaint is not None and complaint not in self._complaints:
                self._complaints.add(complaint)
                logger.warning("stabnorm: companion %r: %s", self.name, complaint)
        return arrived if self.rows else None  # a record has no block of no rows

    def _follow_rows(self) -> None:
        """Take over rows that the watch has added: NaN in the steps before.

        A new detector reads the history again, so that each row keeps its past; its alerts have been raised before.
        """
        if self.watch.rows == self.rows:
            return
        before, self.rows = self.rows, self.watch.rows
        kept = [self.rows.index(name) for name in before]

        def widened(rows: Tensor) -> Tensor:
            wider = rows.new_full((*rows.shape[:-2], len(self.rows), self.layout.width), torch.nan)
            return wider.index_copy_(-2, torch.tensor(kept, dtype=torch.int64, device=rows.device), rows)

        steps, values = self._history.steps(), widened(self._history.values())
        self._history = self._empty_history()
        self.detector = self._make_detector(self.statistics, self.rows, ())
        if len(steps):
            self._history.add(int(steps[0]), values)
            self._detect(int(steps[0]), values, values.new_empty(0))
            self.take_departures()
        if self._in_flight is not None:
            first_step, copy = self._in_flight
            rows = widened(copy.wait()[0])
            self._in_flight = first_step, AsyncCopy(rows, self._marks_of(rows))
        waiting, self._waiting = [widened(row) for row, _ in self._waiting], []
        for row in waiting:
            self.add(row)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the next step, and the rows since the last flush; the others are in the record."""
        values, marks = self.unflushed() or (self.no_rows(), self.no_rows())
        return {
            "rows": list(self.rows),
            "statistics": list(self.layout.statistics),
            "watch": self.watch.state_dict(),
            "detector": self.detector.state_dict(),
            "values": values,
            "marks": marks,
        }

    def load_state_dict(self, state: dict[str, Any], steps_done: int) -> None:
        """Continue from a state after a number of steps; start again, with a warning, if the rows are different."""
        self.watch.expect(state["rows"])
        self._follow_rows()
        self.restore(steps_done)
        statistics = state.get("statistics", list(self.layout.statistics))  # older checkpoints do not name them
        if state["rows"] != list(self.rows) or statistics != list(self.layout.statistics):
            logger.warning("the checkpoint's companion %r watched other rows: it starts afresh", self.name)
            return
        known = self.load_baselines(state) and "marks" in state
        self.restore(steps_done, state["values"].cpu(), state["marks"].cpu() if known else None)

    def load_baselines(self, state: dict[str, Any]) -> bool:
        """Take over what was usual in an earlier state of the same rows, and return whether the detector could.

        The history stays.
        """
        if state["rows"] != list(self.rows):
            return False
        self.watch.load_state_dict(state["watch"])
        return self.load_detector(state["detector"])


class CompanionTracks(Mapping[str, CompanionTrack]):
    """The tracks of a monitor's companions, by name.

    Args:
        companions: what to watch.
        model: the model.
        detector: makes the detector of each.
        flush_every: the monitor's.
        flush: the monitor's.

    Raises:
        ValueError: a companion finds nothing to watch in this model.
    """

    def __init__(
        self,
        companions: Sequence[Companion],
        model: nn.Module,
        detector: MakeDetector,
        flush_every: int,
        flush: Callable[[], None],
    ) -> None:
        self._tracks = {c.name: CompanionTrack(c, model, detector, flush_every, flush) for c in companions}
        self._step_seconds = 0.0

    def __getitem__(self, name: str) -> CompanionTrack:
        return self._tracks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tracks)

    def __len__(self) -> int:
        return len(self._tracks)

    def attach(self) -> None:
        """Register the hooks of all companions; if one fails, remove them all."""
        self.detach()
        try:
            for track in self.values():
                track.watch.attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove all hooks."""
        for track in self.values():
            track.watch.detach()

    def discard(self) -> None:
        """Discard what was gathered since the last step."""
        for track in self.values():
            track.watch.discard()

    def step(self, layers: Sequence[str], norms: NormMoments, loss: StepLoss) -> None:
        """End a step, see `CompanionTrack.step`."""
        start = time.perf_counter()
        for track in self.values():
            track.step(layers, norms, loss)
        self._step_seconds += time.perf_counter() - start

    @property
    def computes_loss(self) -> bool:
        """Whether a companion computes the loss of a step again."""
        return any(track.computes_loss for track in self.values())

    @property
    def hook_seconds(self) -> float:
        """Time spent in hooks so far, on the host."""
        return sum(track.watch.seconds for track in self.values())

    @property
    def seconds(self) -> float:
        """Time spent in hooks and steps so far, on the host; the flushes' is the monitor's."""
        return self.hook_seconds + self._step_seconds

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each companion, by name."""
        return {name: track.state_dict() for name, track in self.items()}

    def load_baselines(self, state: dict[str, Any]) -> None:
        """Take over what was usual in an earlier state, see `CompanionTrack.load_baselines`."""
        for name, track in self.items():
            if name in state:
                track.load_baselines(state[name])

    def load_state_dict(self, state: dict[str, Any], steps_done: int) -> None:
        """Continue from a state; a companion that the state does not have starts again."""
        for name, track in self.items():
            if name in state:
                track.load_state_dict(state[name], steps_done)
