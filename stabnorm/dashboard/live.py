"""What is drawn and told while a run trains: a record writer that keeps the last steps in memory."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stabnorm.dashboard.readers import MemoryReader
from stabnorm.dashboard.relative_map import SCALES, relative_map
from stabnorm.dashboard.report import markdown_report
from stabnorm.dashboard.runs import Run
from stabnorm.monitor.outputs import Guard
from stabnorm.monitor.record import Block, Event

EVERY = 20  # flushes between two pictures of a calm run
SHOWN = 5_000  # steps of a picture while the run trains, at most
KEPT_BYTES = 64 << 20  # of the blocks in memory, of which the picture at the end is drawn
_SERIES = ("loss", "tokens", "lam")


class LivePicture:
    """A record writer that draws every layer against its usual value: at each alert, and every 20 flushes.

    A run that is killed has then a picture and a text all the same. They are about the last 5,000 steps; `picture` and
    `report` are about all steps that fit into 64 MiB.

    Args:
        draw: takes a picture, uint8 [height, width, 3], and its step.
        tell: takes a Markdown text about the alerts so far, and its step.
        name: what the text calls the run. Default: "run".

    Example:
        >>> drawn = []
        >>> picture = LivePicture(lambda image, step: drawn.append(step), lambda text, step: None)
        >>> picture.write_block(Block(0, ("norm",), {"amax": np.ones((50, 1))}))
        >>> picture.write_event("alert", 49, {"step": 49, "layer": "norm", "statistic": "amax", "value": 9.0})
        >>> drawn
        [49]
    """

    def __init__(
        self,
        draw: Callable[[npt.NDArray[np.uint8], int], None],
        tell: Callable[[str, int], None],
        name: str = "run",
    ) -> None:
        self._draw, self._tell, self._name = draw, tell, name
        self._guard = Guard()
        self._blocks = deque[Block]()
        self._bytes = 0
        self._events: list[Event] = []
        self._flushes = 0
        self._drawn_to = -1

    def write_block(self, block: Block) -> None:
        """Keep what a picture needs, and draw one if it is time."""
        if block.companion or not block.num_steps:
            return
        scale = next((name for name in SCALES if name in block.series), None)
        names = [name for name in (scale, *_SERIES) if name is not None and name in block.series]
        kept = {name: block.series[name].copy() for name in names}  # a view would keep the whole flush in memory
        self._blocks.append(Block(block.first_step, block.layers, kept))
        self._bytes += _size(self._blocks[-1])
        while len(self._blocks) > 1 and self._bytes > KEPT_BYTES:
            self._bytes -= _size(self._blocks.popleft())
        self._flushes += 1
        if self._flushes % EVERY == 0:
            self._guard.attempt("no picture is drawn while the run trains", self._show)

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        """Draw and tell an alert, once for all alerts of a flush that come before the next block."""
        self._events.append(Event(kind, step, data))
        if kind in ("alert", "rows"):  # a block or an event is kept once, whatever comes of its picture
            self._guard.attempt("nothing is told of an alert", self._report_alert, step)
        if kind == "alert":
            self._guard.attempt("no picture is drawn while the run trains", self._show)

    def _report_alert(self, step: int) -> None:
        self._tell(markdown_report([self._run(SHOWN)]), step)

    def close(self) -> None:
        """Do nothing, because the end of a training has a picture of its own."""

    def picture(self) -> npt.NDArray[np.uint8] | None:
        """Draw all that is in memory; None if there is nothing to draw."""
        return relative_map(self._run())

    def report(self) -> str:
        """Return verdict, alerts and advice as Markdown."""
        return markdown_report([self._run()])

    def _run(self, most: int | None = None) -> Run:
        last = self._blocks[-1].last_step if self._blocks else 0
        blocks = [block for block in self._blocks if most is None or last - block.first_step < most]
        run = Run(self._name, _BlockReader(blocks, self._events))
        run.refresh()
        return run

    def _show(self) -> None:
        last = self._blocks[-1].last_step if self._blocks else -1
        if last <= self._drawn_to:
            return
        image = relative_map(self._run(SHOWN))
        if image is not None:
            self._draw(image, last)
        self._drawn_to = last


def _size(block: Block) -> int:
    return sum(values.nbytes for values in block.series.values())


class _BlockReader(MemoryReader):
    """Gives blocks that are kept in memory."""

    def __init__(self, blocks: list[Block], events: list[Event]) -> None:
        super().__init__({}, events)
        self._blocks = blocks

    def pieces(self) -> Any:
        """Yield the blocks once."""
        blocks, self._blocks = self._blocks, []
        for block in blocks:
            for name, values in block.series.items():
                yield from MemoryReader(
                    {"": (block.layers, np.arange(block.first_step, block.last_step + 1), {name: values})}
                ).pieces()
