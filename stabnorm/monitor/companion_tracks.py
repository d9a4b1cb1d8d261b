"""`CompanionTracks`: the tracks of a monitor's companions, one for each.

A companion measures by itself; its track adds a row at each step, and follows rows that it finds later.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabnorm._log import logger
from stabnorm._models.async_copy import AsyncCopy
from stabnorm.companions.companion import Companion, NormMoments, StepLoss
from stabnorm.monitor.alerts import Alert
from stabnorm.monitor.detect import MakeDetector
from stabnorm.monitor.record import Block
from stabnorm.monitor.track import Track


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
        if not self._tracks:
            return
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
        return sum(track.watch.seconds for track in self.values()) if self._tracks else 0.0

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
