"""Readers of a record: TensorBoard's event files, files of our own, or what a monitor holds in memory.

Each of them gives only what is new since the last time, so that a page can follow a run that still trains.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from stabnorm.monitor._event_files import placed_events
from stabnorm.monitor._record_files import StepFile, read_series, step_files, stored_parts, unpack_line, whole_lines
from stabnorm.monitor._record_format import PLUGIN_NAME, description_of, event_files
from stabnorm.monitor.record import Event

_FLOAT32 = 1  # TensorFlow's number of the type
_AT_ONCE = 32 << 20  # bytes that are read at once
_VALIDATION = re.compile(r"val(id(ation)?)?[/_.]", re.IGNORECASE)  # scalars of a logger that the timeline shows


class Piece(NamedTuple):
    """Some steps of one series, which `load` reads from the file; thinned ones are in buckets of so many steps."""

    first_step: int
    num_steps: int
    layers: tuple[str, ...]
    load: Callable[[], npt.NDArray[Any]]
    bucket: int = 1


class Reader(Protocol):
    """Where a run's record comes from.

    Attributes:
        begins_again: whether the last pieces were all there are, in place of those before.
    """

    begins_again: bool

    @property
    def notes(self) -> list[str]:
        """Sentences about what could not be read."""

    @property
    def validation(self) -> dict[str, dict[int, float]]:
        """Scalars of validation that lie beside the record: tag -> step -> value."""

    def pieces(self) -> Iterator[tuple[str, str, Piece]]:
        """Yield (companion, series, piece) of what was written since the last time."""

    def take_events(self) -> list[Event]:
        """Return the events that were written since the last time."""


class EventReader:
    """Reads the tensors of ours in a run's event files, each byte once."""

    def __init__(self, directory: Path) -> None:
        self.notes: list[str] = []
        self.validation: dict[str, dict[int, float]] = {}
        self.begins_again = False
        self._directory = directory
        self._offsets: dict[Path, int] = {}
        self._contents: dict[str, dict[str, Any]] = {}
        self._undescribed: dict[str, list[_TensorAt]] = {}
        self._same: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._events: list[Event] = []

    def pieces(self) -> Iterator[tuple[str, str, Piece]]:
        """Yield (companion, series, piece) of what was written since the last time."""
        for path, offset, body, event in self._new_events():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == PLUGIN_NAME:
                    self._describe(path, value.tag, value.metadata.plugin_data.content)
                place = _TensorAt(path, offset, len(body), event.step, value.tag)
                if value.tag in self._contents:
                    for earlier in self._undescribed.pop(value.tag, []):
                        yield from self._piece(earlier, earlier.value_in(earlier.body()), earlier.body())
                    yield from self._piece(place, value, body)
                elif value.tag.startswith(f"{PLUGIN_NAME}/") and value.HasField("tensor"):
                    self._undescribed.setdefault(value.tag, []).append(place)  # its description was damaged
                elif _VALIDATION.match(value.tag) and value.WhichOneof("value") == "simple_value":
                    self.validation.setdefault(value.tag, {})[event.step] = value.simple_value

    def _piece(self, place: "_TensorAt", value: Any, body: bytes) -> Iterator[tuple[str, str, Piece]]:
        from tensorboard.util.tensor_util import make_ndarray

        content = self._contents[value.tag]
        try:
            if "event" in content:
                data = json.loads(make_ndarray(value.tensor).item())
                self._events.append(Event(content["event"], place.step, data))
                return
            shape = tuple(int(axis.size) for axis in value.tensor.tensor_shape.dim)
            num_steps = shape[0]
        except (IndexError, TypeError, ValueError):
            self._note(f"A value of {value.tag} is not as its tag describes it, and is left out.")
            return
        load = place.numbers(body, value.tensor, shape) or place.array
        piece = Piece(place.step - num_steps + 1, num_steps, self._layers(content["layers"]), load)
        yield content.get("companion", ""), content["series"], piece

    def _layers(self, layers: list[str]) -> tuple[str, ...]:
        """Return one tuple for all pieces of the same layers."""
        names = tuple(layers)
        return self._same.setdefault(names, names)

    def _describe(self, path: Path, tag: str, content: bytes) -> None:
        try:
            described = description_of(content, self._directory)
        except ValueError as error:
            self._note(f"{error}.")
            return
        if described is None:
            self._note(f"{path.name}: the description of {tag} is damaged.")
        else:
            self._contents.setdefault(tag, described)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _new_events(self) -> Iterator[tuple[Path, int, bytes, Any]]:
        for path in event_files(self._directory):
            try:
                if path.stat().st_size > self._offsets.get(path, 0):
                    yield from self._new_events_of(path)
            except OSError as error:
                self._note(f"{path.name} cannot be read: {error}.")

    def _new_events_of(self, path: Path) -> Iterator[tuple[Path, int, bytes, Any]]:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from tensorboard.compat.proto.event_pb2 import Event as ProtoEvent

        begin, size = self._offsets.get(path, 0), _AT_ONCE
        with path.open("rb") as file:
            while True:
                file.seek(begin)
                content = file.read(size)
                read_to = 0
                for start, end, body in placed_events(content):
                    try:
                        event = None if body is None else ProtoEvent.FromString(body)
                    except DecodeError:
                        event = None
                    if event is None or body is None:
                        self._note(f"{path.name} is damaged near byte {begin + start:,}; what was there is left out.")
                    else:
                        yield path, begin + start, body, event
                    read_to = end
                begin += read_to
                self._offsets[path] = begin
                if len(content) < size:  # what is left, if anything, is still being written
                    return
                size = _AT_ONCE if read_to else 2 * size  # an event may be longer than what was read

    def take_events(self) -> list[Event]:
        """Return the events that `pieces` has met since the last time."""
        events, self._events = self._events, []
        return events


class _TensorAt(NamedTuple):
    """The place of one tensor in an event file, from where it is read again."""

    path: Path
    offset: int
    length: int
    step: int
    tag: str

    def numbers(self, body: bytes, tensor: Any, shape: tuple[int, ...]) -> Callable[[], npt.NDArray[Any]] | None:
        """Return what reads the tensor's numbers without parsing; None if they do not lie there as float32."""
        content = tensor.tensor_content
        if tensor.dtype != _FLOAT32 or not content or len(content) != 4 * int(np.prod(shape)):
            return None
        within = body.rfind(content)
        return _NumbersAt(self.path, self.offset + within, shape).array if within >= 0 else None

    def body(self) -> bytes:
        """Read the event."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def value_in(self, body: bytes) -> Any:
        """Return the value that holds the tensor."""
        from tensorboard.compat.proto.event_pb2 import Event as ProtoEvent

        return next(value for value in ProtoEvent.FromString(body).summary.value if value.tag == self.tag)

    def array(self) -> npt.NDArray[Any]:
        """Read the array."""
        from tensorboard.util.tensor_util import make_ndarray

        array: npt.NDArray[Any] = make_ndarray(self.value_in(self.body()).tensor)
        return array


class _NumbersAt(NamedTuple):
    """The place of a tensor's numbers in a file, which need not be parsed."""

    path: Path
    offset: int
    shape: tuple[int, ...]

    def array(self) -> npt.NDArray[Any]:
        """Read the array."""
        count = int(np.prod(self.shape))
        return np.fromfile(self.path, "<f4", count, offset=self.offset).reshape(self.shape)


class FileReader:
    """Reads the files of a `FileRecord`, each one once."""

    def __init__(self, directory: Path) -> None:
        self.notes: list[str] = []
        self.validation: dict[str, dict[int, float]] = {}
        self.begins_again = False
        self._directory = directory
        self._read: dict[StepFile, list[tuple[str, str, Piece]]] = {}
        self._same: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._lines = 0

    def pieces(self) -> Iterator[tuple[str, str, Piece]]:
        """Yield (companion, series, piece) of the steps that are new; of all, where old ones were thinned since."""
        files = step_files(self._directory)[0]
        gone = self._read.keys() - set(files)
        self.begins_again = bool(gone)
        for file in gone:
            del self._read[file]
        new = [file for file in files if file not in self._read]
        for file in new:
            self._read[file] = list(self._pieces_of(file))
        for file in files if gone else new:
            yield from self._read[file]

    def _pieces_of(self, file: StepFile) -> Iterator[tuple[str, str, Piece]]:
        try:
            parts = stored_parts(file.path.read_bytes())
        except FileNotFoundError:  # it has been thinned just now
            return
        except Exception:  # a damaged file of a zip archive can raise almost anything
            self.notes.append(f"{file.path.name} is damaged; its steps are left out.")
            return
        for number, part in enumerate(parts):
            layers = self._same.setdefault(part.layers, part.layers)
            for name in part.names:
                load = functools.partial(read_series, file.path, number, name)
                yield part.companion, name, Piece(part.first_step, part.num_steps, layers, load, file.size)

    def take_events(self) -> list[Event]:
        """Return the events that were written since the last time."""
        lines = whole_lines(self._directory / "events.jsonl")
        events = []
        for line in lines[self._lines :]:
            try:
                event = unpack_line(line)
                events.append(Event(event["kind"], int(event["step"]), event["data"]))
            except (ValueError, KeyError, TypeError):
                self.notes.append("A line of events.jsonl is damaged and left out.")
        self._lines = len(lines)
        return events


class RunReader:
    """Reads a `FileRecord`, and what TensorBoard's event files beside it have.

    That is scalars of validation, and the begin of a record that an earlier version wrote there.

    Args:
        files: reads the record.
        events: reads the event files.
    """

    def __init__(self, files: FileReader, events: EventReader) -> None:
        self.begins_again = False
        self._files, self._events = files, events
        self._began: list[tuple[str, str, Piece]] = []
        self._first: float = math.inf  # step of the files

    @property
    def notes(self) -> list[str]:
        """What could not be read."""
        return [*self._events.notes, *self._files.notes]

    @property
    def validation(self) -> dict[str, dict[int, float]]:
        """The scalars of validation."""
        return self._events.validation

    def pieces(self) -> Iterator[tuple[str, str, Piece]]:
        """Yield (companion, series, piece) of what is new; of all, where old steps were thinned since."""
        began = list(self._events.pieces())
        written = list(self._files.pieces())
        self._first = min([self._first, *(piece.first_step for _, _, piece in written)])
        self._began += began
        self.begins_again = self._files.begins_again
        earlier = self._began if self.begins_again else began
        yield from (found for found in earlier if found[2].first_step < self._first)
        yield from written

    def take_events(self) -> list[Event]:
        """Return the events that were written since the last time."""
        return [*self._events.take_events(), *self._files.take_events()]


class MemoryReader:
    """Gives what a monitor still holds in memory.

    Args:
        parts: companion ("" for the norms) -> layers, steps, and series by name.
        events: alerts and others. Default: none.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[Sequence[str], npt.NDArray[Any], Mapping[str, npt.NDArray[Any]]]],
        events: Iterable[Event] = (),
    ) -> None:
        self.notes: list[str] = []
        self.validation: dict[str, dict[int, float]] = {}
        self.begins_again = False
        self._parts, self._events = dict(parts), list(events)

    def pieces(self) -> Iterator[tuple[str, str, Piece]]:
        """Yield everything once, a piece for each stretch of steps without a gap."""
        parts, self._parts = self._parts, {}
        for companion, (layers, steps, series) in parts.items():
            ends = [0, *(np.flatnonzero(np.diff(steps) != 1) + 1).tolist(), len(steps)]
            for begin, end in itertools.pairwise(ends):
                for name, values in series.items():
                    load = functools.partial(np.asarray, values[begin:end])
                    if end > begin:
                        yield companion, name, Piece(int(steps[begin]), end - begin, tuple(layers), load)

    def take_events(self) -> list[Event]:
        """Return all events, once."""
        events, self._events = self._events, []
        return events
