"""`Tracks`: the companions of one monitor. They share its steps and its flushes, and have their own rows."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm.companions.companion import Companion
from stabnorm.companions.names import resolve_companions
from stabnorm.monitor.buffers import Flight, History, joined
from stabnorm.monitor.detect import Alert, Detector
from stabnorm.monitor.record import Block

logger = logging.getLogger("stabnorm")


class Track:
    """One companion of a monitor: what it measured of every row at every step.

    Attributes:
        rows: what it watches, by name.
        measures: what it measures, see `stabnorm.companions.companion.Measure`.
    """

    def __init__(self, companion: Companion, model: nn.Module, flush_every: int, flush: Callable[[], None]) -> None:
        self.name, self.measures = companion.name, companion.measures
        self.watch = companion.watch(model)
        self.rows = self.watch.rows
        self._flush = flush
        self._waiting: list[Tensor] = []  # one [rows, measures] per step since the last flush
        self._in_flight: Flight | None = None
        self._history = History(len(self.rows), len(self.measures), flush_every)
        self._detector = Detector(self.measures, self.rows)
        self._said: set[str] = set()

    def history(self) -> dict[str, Tensor]:
        """Every measure of every step, ``[steps, rows]``; flushes the monitor first.

        NaN where a row had nothing to measure. Bounded in memory: of a very long run the last 64 MiB are kept.
        """
        self._flush()
        values = self._history.values()
        return {measure.name: values[:, :, column] for column, measure in enumerate(self.measures)}

    def history_steps(self) -> Tensor:
        """The optimizer steps that the rows of `history()` stand for, counted from 0."""
        self._flush()
        return self._history.steps()

    def step(self) -> None:
        """End a step: from what was gathered to a row."""
        sums = self.watch.take()
        row = torch.stack([measure.compute(sums) for measure in self.measures], -1)
        self._waiting.append(row.to(torch.float32))
        self.watch.discard()

    def send(self, steps_done: int) -> None:
        """Start the copy of what waits to the host."""
        if self._waiting:
            self._in_flight = self._flight(steps_done)
            self._waiting.clear()

    def _flight(self, steps_done: int) -> Flight:
        device = self._waiting[-1].device
        steps = torch.stack([row.to(device) for row in self._waiting])  # the model may have moved in between
        return Flight(steps_done - len(steps), steps, steps[:0])

    def receive(self) -> tuple[Block, list[Alert]] | None:
        """What has arrived, and what is wrong with it."""
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return None
        flight.wait()
        self._history.add(flight)
        complaint = self.watch.complaint(flight.rows)
        if complaint is not None and complaint not in self._said:
            self._said.add(complaint)
            logger.warning("stabnorm: companion %r: %s", self.name, complaint)
        # Every row stands for many tokens; what is not finite is the norms' to tell.
        enough = torch.full(flight.rows.shape[:2], torch.inf)
        alerts = self._detector.update(flight.first_step, flight.rows, enough, torch.zeros_like(enough) > 0)
        series = {measure.name: flight.rows[:, :, i].numpy() for i, measure in enumerate(self.measures)}
        return Block(flight.first_step, self.rows, series, companion=self.name), alerts

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs of the last ones, and those since the last flush; the others are in the record."""
        waiting = joined(self._in_flight, self._flight(0) if self._waiting else None)
        return {
            "rows": list(self.rows),
            "watch": self.watch.state_dict(),
            "detector": self._detector.state_dict(),
            "values": self._history.none() if waiting is None else waiting.rows,
        }

    def load_state_dict(self, state: dict[str, Any], steps_done: int) -> None:
        """Go on where `state_dict` was taken, after so many steps; afresh, with a warning, when the rows are others."""
        self._history.clear()
        mine = self.state_dict()
        if state["rows"] != mine["rows"] or state["detector"]["past"].shape != mine["detector"]["past"].shape:
            logger.warning("the checkpoint's companion %r watched other rows: it starts afresh", self.name)
            return
        self.watch.load_state_dict(state["watch"])
        self._detector.load_state_dict(state["detector"])
        values = state["values"].cpu()
        if len(values):
            self._in_flight = Flight(steps_done - len(values), values, values[:0])  # for the next flush


class Tracks(Mapping[str, Track]):
    """The companions of a monitor, by name.

    Args:
        companions: names or companions.
        model: the model.
        flush_every: the monitor's.
        flush: the monitor's.

    Raises:
        ValueError: an unknown companion, or one that finds nothing to watch in this model.
    """

    def __init__(
        self, companions: Sequence[str | Companion], model: nn.Module, flush_every: int, flush: Callable[[], None]
    ) -> None:
        self._tracks = {c.name: Track(c, model, flush_every, flush) for c in resolve_companions(companions)}
        self._step_seconds = 0.0

    def __getitem__(self, name: str) -> Track:
        return self._tracks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tracks)

    def __len__(self) -> int:
        return len(self._tracks)

    def attach(self) -> None:
        """Put all hooks on; none of them when one fails."""
        self.detach()
        try:
            for track in self.values():
                track.watch.attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take every hook off."""
        for track in self.values():
            track.watch.detach()

    def discard(self) -> None:
        """Forget what was gathered since the last step."""
        for track in self.values():
            track.watch.discard()

    def step(self) -> None:
        """End a step."""
        start = time.perf_counter()
        for track in self.values():
            track.step()
        self._step_seconds += time.perf_counter() - start

    def send(self, steps_done: int) -> None:
        """Start the copy to the host."""
        for track in self.values():
            track.send(steps_done)

    def receive(self) -> Iterator[tuple[Block, list[Alert]]]:
        """What has arrived of each companion."""
        for track in self.values():
            arrived = track.receive()
            if arrived is not None:
                yield arrived

    @property
    def hook_seconds(self) -> float:
        """Time spent in hooks so far, on the host."""
        return sum(track.watch.seconds for track in self.values())

    @property
    def seconds(self) -> float:
        """Time spent in hooks and steps so far, on the host; the flushes' is the monitor's."""
        return self.hook_seconds + self._step_seconds

    def state_dict(self) -> dict[str, Any]:
        """By companion."""
        return {name: track.state_dict() for name, track in self.items()}

    def load_state_dict(self, state: dict[str, Any], steps_done: int) -> None:
        """Go on where `state_dict` was taken; a companion that was not there then starts afresh."""
        for name, track in self.items():
            if name in state:
                track.load_state_dict(state[name], steps_done)
