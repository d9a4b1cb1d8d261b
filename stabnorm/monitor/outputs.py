"""The one place where everything is called that writes, draws or logs. Its errors never reach the training.

A full disk, a folder that somebody swept away, or a logger whose server is down is no reason to lose a training. The
first error of each kind is logged on one line with its cause, and the training goes on. What a record could not take
waits in memory, and every later flush tries again.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from stabnorm._log import logger
from stabnorm.monitor.record import Block, RecordWriter

_MOST_BYTES = 64 << 20  # of the blocks that wait for one writer
_EVENT_BYTES = 1 << 10  # what an event is counted as
_TRIES = 10  # for a block or an event that is refused while others are taken
_LONGEST = 300  # characters of a cause

Result = TypeVar("Result")


def say(message: str, *args: object) -> None:
    """Log a warning; a handler that fails is not the training's concern either."""
    with contextlib.suppress(Exception):
        logger.warning(message, *args)


def cause(error: BaseException) -> str:
    """Say on one line what went wrong.

    >>> cause(OSError(28, "No space left on device"))
    'OSError: [Errno 28] No space left on device'
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class Guard:
    """Calls what may fail, and warns once of each thing that does."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def attempt(self, what: str, do: Callable[..., Result], *args: Any) -> Result | None:
        """Call `do` and return its result; None if it raises.

        Args:
            what: what cannot be done if it raises, as the subject of a sentence.
            do: the function.
            *args: its arguments.

        >>> Guard().attempt("the picture cannot be drawn", max, [3, 4])
        4
        """
        try:
            return do(*args)
        except Exception as error:
            if what not in self._told:
                self._told.add(what)
                say("stabnorm: %s, and the training goes on: %s", what, cause(error))
            return None


class Outputs(Guard):
    """Hands blocks and events to record writers, each of which fails for itself.

    >>> from stabnorm.monitor.record import Block
    >>> class Flaky:
    ...     full, blocks = True, []
    ...
    ...     def write_block(self, block):
    ...         if self.full:
    ...             raise OSError("no space left")
    ...         self.blocks.append(block.first_step)
    >>> outputs, writer = Outputs(), Flaky()
    >>> outputs.write_block([writer], Block(0, (), {"loss": [0.5]}))
    >>> writer.full = False
    >>> outputs.write_block([writer], Block(1, (), {"loss": [0.4]}))
    >>> writer.blocks
    [0, 1]
    """

    def __init__(self) -> None:
        super().__init__()
        self._deliveries: list[_Delivery] = []

    def write_block(self, writers: Iterable[RecordWriter], block: Block) -> None:
        """Hand a block to each of the writers."""
        size = sum(values.nbytes for values in block.series.values())
        for writer in writers:
            self._delivery(writer).send("write_block", (block,), size)

    def write_event(self, writers: Iterable[RecordWriter], kind: str, step: int, data: Mapping[str, Any]) -> None:
        """Hand an event to each of the writers."""
        for writer in writers:
            self._delivery(writer).send("write_event", (kind, step, data), _EVENT_BYTES)

    def retry(self) -> None:
        """Hand over what waits, if there is anything."""
        for delivery in self._deliveries:
            delivery.deliver()

    def close(self, writers: Iterable[RecordWriter]) -> None:
        """Hand over what waits, and close the writers; say what is lost."""
        for writer in writers:
            delivery = self._delivery(writer)
            delivery.deliver()
            name = _name(writer)
            self.attempt(f"{name} cannot be closed", writer.close)
            if delivery.waiting:
                say("stabnorm: %s has not taken %d blocks and events, and they are lost", name, delivery.waiting)
            self._deliveries.remove(delivery)

    def _delivery(self, writer: RecordWriter) -> "_Delivery":
        for delivery in self._deliveries:
            if delivery.writer is writer:
                return delivery
        self._deliveries.append(_Delivery(writer))
        return self._deliveries[-1]


class _Item:
    """A block or an event that waits."""

    def __init__(self, args: tuple[Any, ...], size: int) -> None:
        self.args, self.size, self.refused = args, size, 0  # refused: how often, while another one was taken


class _Delivery:
    """What one writer gets, in order. What it could not take waits, and of too much of it the oldest is given up."""

    def __init__(self, writer: RecordWriter) -> None:
        self.writer = writer
        self._queues: dict[str, deque[_Item]] = {"write_block": deque(), "write_event": deque()}
        self._bytes = 0
        self._told = self._gave_up = False

    @property
    def waiting(self) -> int:
        """The number of blocks and events that wait."""
        return sum(map(len, self._queues.values()))

    def send(self, method: str, args: tuple[Any, ...], size: int) -> None:
        """Hand this over, after what has waited longer."""
        self._queues[method].append(_Item(args, size))
        self._bytes += size
        self.deliver()
        while self._bytes > _MOST_BYTES:
            self._give_up(max(self._queues.values(), key=len).popleft(), "more waits than is kept")

    def deliver(self) -> None:
        """Hand over what waits, in order, as far as the writer takes it."""
        for method, queue in self._queues.items():
            while queue and self._taken(method, queue[0]):
                queue.popleft()
            if len(queue) > 1 and self._taken(method, queue[-1]):
                queue.pop()  # the writer works, so something is wrong with single blocks or events
                self._pass_over(method, queue)

    def _pass_over(self, method: str, queue: deque[_Item]) -> None:
        for _ in range(len(queue)):
            item = queue.popleft()
            if self._taken(method, item):
                continue
            item.refused += 1
            if item.refused < _TRIES:
                queue.append(item)
            else:
                self._give_up(item, f"single ones were refused {_TRIES} times")

    def _taken(self, method: str, item: _Item) -> bool:
        try:
            getattr(self.writer, method)(*item.args)
        except Exception as error:
            if not self._told:
                self._told = True
                say(
                    "stabnorm: %s cannot write; the training goes on, what it should have written waits in memory, and "
                    "every flush tries again: %s",
                    _name(self.writer),
                    cause(error),
                )
            return False
        self._bytes -= item.size
        return True

    def _give_up(self, item: _Item, why: str) -> None:
        self._bytes -= item.size
        if not self._gave_up:
            self._gave_up = True
            say("stabnorm: blocks or events for %s are given up, because %s", _name(self.writer), why)


def _name(writer: RecordWriter) -> str:
    """Return what warnings call a writer: its `name`, or its class."""
    return str(getattr(writer, "name", type(writer).__name__))
