"""Find runs below a folder, and read their records bit by bit while they grow.

A record may be larger than the memory: a `Run` keeps where each tensor lies in its file, and reads a series when it is
asked for. What cannot be read is left out, and said in `Run.notes`.
"""

import itertools
import json
import mmap
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stabnorm.dashboard.baseline import Baseline
from stabnorm.dashboard.definitions import definition
from stabnorm.monitor._event_files import placed_events
from stabnorm.monitor._record_files import block_number, unpack_arrays, unpack_line, whole_lines
from stabnorm.monitor._record_format import PLUGIN_NAME, description_of, event_files
from stabnorm.monitor.record import SIDE_SERIES, Event, check_shape

Array = npt.NDArray[np.float32]

CACHE_BYTES = 256 * 2**20  # of series in memory, for each run
_VALIDATION = re.compile(r"val(id(ation)?)?[/_.]", re.IGNORECASE)  # scalars of a logger that the timeline shows
_SKIPPED = re.compile(r"checkpoints|\.git|__pycache__|wandb-core")


class Piece(NamedTuple):
    """Some steps of one series, which `load` reads from the file."""

    first_step: int
    num_steps: int
    layers: tuple[str, ...]
    load: Callable[[], npt.NDArray[Any]]


class Rows(NamedTuple):
    """What one record has of the norms, or of one companion.

    Attributes:
        layers: names of all rows, in the order in which they appeared.
        steps: all steps that were written, in ascending order.
    """

    layers: tuple[str, ...]
    steps: npt.NDArray[np.int64]


class Run:
    """The record of one run, as far as it was written and can be read.

    Args:
        name: what the page calls it.
        directory: the folder with TensorBoard's event files, or with the files of a `FileRecord`.

    Attributes:
        events: alerts and others, in the order of their steps, each one once.
        version: a number that grows when `refresh` has found something new.
        notes: sentences about what could not be read, or was read twice.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.events: list[Event] = []
        self.version = 0
        self._pieces: dict[tuple[str, str], list[Piece]] = {}
        of_files = (directory / "record.json").exists() or any(directory.glob("block-*.npz"))
        self._reader = FileReader(directory) if of_files else EventReader(directory)
        self._rows: dict[str, Rows] = {}
        self._cache = OrderedDict[tuple[str, str], tuple[Array, Baseline]]()
        self._known_events: set[str] = set()

    def __bool__(self) -> bool:
        """Whether there is a record at all."""
        return bool(self._pieces or self.events)

    def refresh(self) -> bool:
        """Read what was written since the last time, and return whether there was anything."""
        found = False
        for companion, name, piece in self._reader.pieces():
            self._pieces.setdefault((companion, name), []).append(piece)
            found = True
        for event in self._reader.take_events():
            key = json.dumps(event, default=str)
            if key not in self._known_events:  # a resumed run may write an event again
                self._known_events.add(key)
                self.events.append(event)
                found = True
        if found:
            self.events.sort(key=lambda event: event.step)
            self._rows.clear()
            self._cache.clear()
            self.version += 1
        return found

    @property
    def notes(self) -> list[str]:
        """Return what a reader should know about the record itself."""
        notes = list(self._reader.notes)
        for before, after in itertools.pairwise(self._pieces_of("")):
            if before.layers != after.layers:
                new, gone = set(after.layers) - set(before.layers), set(before.layers) - set(after.layers)
                notes.append(f"From step {after.first_step} on {len(new)} layers are new and {len(gone)} are gone.")
            if after.first_step < before.first_step + before.num_steps:
                notes.append(
                    f"Steps from {after.first_step} on were written again, as after a resume; the later ones are shown."
                )
        steps = self.rows("").steps
        missing = np.flatnonzero(np.diff(steps) > 1)
        if missing.size:
            first, last = steps[missing[0]] + 1, steps[missing[0] + 1] - 1
            more = f", and {missing.size - 1} more stretches" if missing.size > 1 else ""
            notes.append(f"Steps {first} to {last} are missing from the record{more}.")
        return notes[:8]

    def _pieces_of(self, companion: str) -> list[Piece]:
        """Return the pieces of the series that has the most of them; all series have the same steps."""
        return max((p for (owner, name), p in self._pieces.items() if owner == companion), key=len, default=[])

    @property
    def validation(self) -> dict[str, dict[int, float]]:
        """Return the scalars of validation that the logger wrote beside the record: tag -> step -> value."""
        return self._reader.validation

    def companions(self) -> list[str]:
        """Return the names of what was watched; the norms are ""."""
        return sorted({companion for companion, _ in self._pieces})

    def statistics(self, companion: str = "") -> list[str]:
        """Return the names of the series that have one number for each step and row."""
        beside = {name for name, (axes, _) in SIDE_SERIES.items() if len(axes) != 2}
        return [name for owner, name in self._pieces if owner == companion and name not in beside]

    def rows(self, companion: str = "") -> Rows:
        """Return layers and steps."""
        if companion not in self._rows:
            pieces = [piece for (owner, _), all_ in self._pieces.items() if owner == companion for piece in all_]
            layers = tuple(dict.fromkeys(layer for piece in pieces for layer in piece.layers))
            spans = {(piece.first_step, piece.num_steps) for piece in pieces}
            ranges = [np.arange(first, first + count) for first, count in sorted(spans)]
            steps = np.unique(np.concatenate(ranges)) if ranges else np.empty(0, np.int64)
            self._rows[companion] = Rows(layers, steps)
        return self._rows[companion]

    def series(self, name: str, companion: str = "") -> Array | None:
        """Return a series, ``[steps, ...]``, NaN where there is no value; None if the record does not have it."""
        if (companion, name) not in self._pieces:
            return None
        return self._cached(name, companion)[0]

    def baseline(self, name: str, companion: str = "") -> Baseline:
        """Return what was usual in a series of the record."""
        return self._cached(name, companion)[1]

    def _cached(self, name: str, companion: str) -> tuple[Array, Baseline]:
        key = companion, name
        if key not in self._cache:
            values = self._stitch(self._pieces[key], self.rows(companion))
            baseline = Baseline(values.shape[1] if values.ndim == 2 else 1, definition(name).floor)
            if values.ndim <= 2:
                baseline.extend(values.reshape(len(values), -1))
            self._cache[key] = values, baseline
            while len(self._cache) > 1 and sum(a.nbytes for a, _ in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    @staticmethod
    def _stitch(pieces: list[Piece], rows: Rows) -> Array:
        """Combine the pieces of a series; what was written later replaces what was written before."""
        column = {layer: i for i, layer in enumerate(rows.layers)}
        out: Array | None = None
        for piece in pieces:
            try:
                part = np.asarray(piece.load(), np.float32)
                check_shape("", part, piece.num_steps, len(piece.layers))
            except Exception:  # the file has gone or was damaged since it was found
                continue
            if out is not None and part.ndim != out.ndim:
                continue
            if out is None or part.shape[2:] != out.shape[2:]:
                trailing = part.shape[2:] if out is None else tuple(map(max, part.shape[2:], out.shape[2:]))
                wider = np.full((len(rows.steps), len(rows.layers), *trailing)[: part.ndim], np.nan, np.float32)
                if out is not None:
                    inner: tuple[Any, ...] = (..., *map(slice, out.shape[2:]))
                    wider[inner] = out
                out = wider
            at = int(np.searchsorted(rows.steps, piece.first_step))
            if part.ndim == 1:
                out[at : at + len(part)] = part
            else:
                out[at : at + len(part)] = np.nan
                columns = [column[layer] for layer in piece.layers]
                where: tuple[Any, ...] = (slice(at, at + len(part)), columns, *map(slice, part.shape[2:]))
                out[where] = part
        return np.full((len(rows.steps), len(rows.layers)), np.nan, np.float32) if out is None else out


class EventReader:
    """Reads the tensors of ours in a run's event files, each byte once."""

    def __init__(self, directory: Path) -> None:
        self.notes: list[str] = []
        self.validation: dict[str, dict[int, float]] = {}
        self._directory = directory
        self._offsets: dict[Path, int] = {}
        self._contents: dict[str, dict[str, Any]] = {}
        self._undescribed: dict[str, list[_TensorAt]] = {}
        self._events: list[Event] = []

    def pieces(self) -> Iterator[tuple[str, str, Piece]]:
        """Yield (companion, series, piece) of what was written since the last time."""
        for path, offset, length, event in self._new_events():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == PLUGIN_NAME:
                    self._describe(path, value.tag, value.metadata.plugin_data.content)
                place = _TensorAt(path, offset, length, event.step, value.tag)
                if value.tag in self._contents:
                    for earlier in [*self._undescribed.pop(value.tag, []), place]:
                        yield from self._piece(earlier, value if earlier is place else earlier.value())
                elif value.tag.startswith(f"{PLUGIN_NAME}/") and value.HasField("tensor"):
                    self._undescribed.setdefault(value.tag, []).append(place)  # its description was damaged
                elif _VALIDATION.match(value.tag) and value.WhichOneof("value") == "simple_value":
                    self.validation.setdefault(value.tag, {})[event.step] = value.simple_value

    def _piece(self, place: "_TensorAt", value: Any) -> Iterator[tuple[str, str, Piece]]:
        from tensorboard.util.tensor_util import make_ndarray

        content = self._contents[value.tag]
        try:
            if "event" in content:
                data = json.loads(make_ndarray(value.tensor).item())
                self._events.append(Event(content["event"], place.step, data))
                return
            num_steps = value.tensor.tensor_shape.dim[0].size
        except (IndexError, TypeError, ValueError):
            self._note(f"A value of {value.tag} is not as its tag describes it, and is left out.")
            return
        piece = Piece(place.step - num_steps + 1, num_steps, tuple(content["layers"]), place.array)
        yield content.get("companion", ""), content["series"], piece

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

    def _new_events(self) -> Iterator[tuple[Path, int, int, Any]]:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from tensorboard.compat.proto.event_pb2 import Event as ProtoEvent

        for path in event_files(self._directory):
            begin = self._offsets.get(path, 0)
            try:
                if path.stat().st_size <= begin:
                    continue
                with path.open("rb") as file:
                    content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[begin:]
            except (OSError, ValueError) as error:
                self._note(f"{path.name} cannot be read: {error}.")
                continue
            for start, end, body in placed_events(content):
                try:
                    event = None if body is None else ProtoEvent.FromString(body)
                except DecodeError:
                    event = None
                if event is None or body is None:
                    self._note(f"{path.name} is damaged near byte {begin + start:,}; what was there is left out.")
                else:
                    yield path, begin + start, len(body), event
                self._offsets[path] = begin + end

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

    def value(self) -> Any:
        """Read the value that holds the tensor."""
        from tensorboard.compat.proto.event_pb2 import Event as ProtoEvent

        with self.path.open("rb") as file:
            file.seek(self.offset)
            event = ProtoEvent.FromString(file.read(self.length))
        return next(value for value in event.summary.value if value.tag == self.tag)

    def array(self) -> npt.NDArray[Any]:
        """Read the array."""
        from tensorboard.util.tensor_util import make_ndarray

        array: npt.NDArray[Any] = make_ndarray(self.value().tensor)
        return array


class FileReader:
    """Reads the files of a `FileRecord`, each one once."""

    def __init__(self, directory: Path) -> None:
        self.notes: list[str] = []
        self.validation: dict[str, dict[int, float]] = {}
        self._directory = directory
        self._read: set[str] = set()
        self._lines = 0

    def pieces(self) -> Iterator[tuple[str, str, Piece]]:
        """Yield (companion, series, piece) of the blocks that are new."""
        for path in sorted(self._directory.glob("block-*.npz")):
            if path.name in self._read or block_number(path) is None:
                continue
            self._read.add(path.name)
            try:
                with unpack_arrays(path.read_bytes()) as block:  # loads an array only when it is accessed
                    first_step, num_steps = block["@steps"].tolist()
                    layers = tuple(map(str, block["@layers"]))
                    companion = str(block["@companion"]) if "@companion" in block.files else ""
                    names = [name for name in block.files if name[0] != "@"]
            except Exception:  # a damaged file of a zip archive can raise almost anything
                self.notes.append(f"{path.name} is damaged; its steps are left out.")
                continue
            for name in names:
                yield companion, name, Piece(first_step, num_steps, layers, _ArrayOf(path, name).array)

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


class _ArrayOf(NamedTuple):
    """One series of a block, which is read again from its file."""

    path: Path
    name: str

    def array(self) -> npt.NDArray[Any]:
        """Read the array."""
        with unpack_arrays(self.path.read_bytes()) as block:
            array: npt.NDArray[Any] = block[self.name]
            return array


def run_folders(root: Path) -> dict[str, Path]:
    """Return the folders below ``root`` (and itself) that may hold a record, by the name that a page gives the run.

    Example:
        >>> run_folders(Path("no_such_folder"))
        {}
    """
    folders = {}
    for directory, inner, names in os.walk(root, followlinks=True):
        inner[:] = sorted(name for name in inner if not _SKIPPED.fullmatch(name))
        path = Path(directory)
        if any(name == "record.json" or "tfevents" in name or name.startswith("block-") for name in names):
            name = path.relative_to(root).as_posix().removesuffix(PLUGIN_NAME).rstrip("/")
            folders[name if name not in ("", ".") else root.resolve().name] = path
    return folders
