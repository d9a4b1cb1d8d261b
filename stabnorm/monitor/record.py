"""The record of a run, which is all that a dashboard reads. It is in TensorBoard's files or in files of our own.

A flush adds a `Block` of contiguous steps. Something that happens at a single step, such as an alert, is an event.
Shapes are [step], [step, layer] or [step, layer, rank], the last one for the k largest of something. Everything is
float32.
"""

import io
import itertools
import json
import os
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from stabnorm.monitor._folders import local_folder
from stabnorm.monitor._record_format import PLUGIN_NAME as PLUGIN_NAME
from stabnorm.monitor._record_format import VERSION as VERSION
from stabnorm.monitor._record_format import check_version, dumps, tensor_summary, tensors

AXES = ("step", "layer", "rank")

# The series that a record may have besides the statistics of the catalogue: name -> (axes, meaning).
SIDE_SERIES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "loss": (AXES[:1], "training loss"),
    "learning_rate": (AXES[:1], "learning rate of the first parameter group"),
    "tokens": (AXES[:2], "valid tokens the layer saw; 0 where it did not run"),
    "top_channel_ids": (AXES, "channels with the largest magnitude, largest first"),
    "top_channel_values": (AXES, "their magnitudes"),
    "lam": (AXES[:2], "share of LayerNorm in a progressive norm, 1 -> 0"),
    "branch_gap": (AXES[:2], "relative distance between a progressive norm's two branches"),
}
EVENT_KINDS: Mapping[str, str] = {
    "alert": "a statistic crossed its threshold",
    "hold": "the schedule waited, went on or went back",
    "fold_report": "which norms were folded, and what was kept",
}

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Block:
    """The contiguous steps that one flush adds to a record.

    Args:
        first_step: optimizer step of row 0; row i is step `first_step + i`.
        layers: names of the layers, in the order of the layer axis.
        series: name -> values, [steps], [steps, layers] or [steps, layers, k]; kept as float32.
        companion: name of the companion whose rows (heads, matrices) take the place of layers, see
            `stabnorm.companions`. Default: the layers are norms.

    Raises:
        ValueError: a series does not have as many steps as the others, or not one column for each layer.
    """

    first_step: int
    layers: tuple[str, ...]
    series: Mapping[str, Array]
    companion: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "series", {name: np.asarray(a, np.float32) for name, a in self.series.items()})
        shape = (self.num_steps, len(self.layers))
        for name, values in self.series.items():
            if not 1 <= values.ndim <= len(AXES) or values.shape[:2] != shape[: values.ndim]:
                raise ValueError(
                    f"series {name!r} has shape {values.shape} in a block of {shape[0]} steps and {shape[1]} layers; "
                    "give it as [steps], [steps, layers] or [steps, layers, k]"
                )

    @property
    def num_steps(self) -> int:
        """The number of steps in the block."""
        return max((len(values) for values in self.series.values() if values.ndim), default=0)

    @property
    def last_step(self) -> int:
        """The step of the last row."""
        return self.first_step + self.num_steps - 1


class Event(NamedTuple):
    """Something that happened at a step. Numbers in `data` that are not finite are strings that `float` reads back."""

    kind: str
    step: int
    data: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Record:
    """A run as it was written, each step once.

    Args:
        layers: every layer the run had, in order of appearance.
        steps: the steps written, ascending.
        series: name -> [len(steps), ...], NaN where a step or a layer has no value.
        events: in the order of their steps.
    """

    layers: tuple[str, ...]
    steps: npt.NDArray[np.int64]
    series: Mapping[str, Array]
    events: list[Event]


class RecordWriter(Protocol):
    """A destination of a monitor's output."""

    def write_block(self, block: Block) -> None:
        """Add contiguous steps; a step that was already written is replaced."""

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        """Add an event of one of `EVENT_KINDS`; `data` is anything that JSON can say, NaN and infinity included."""

    def close(self) -> None:
        """Write everything to disk."""


class TensorBoardRecord:
    """Writes into the event files of a run: tag `stabnorm/<series>`, one tensor per block, at the block's last step.

    One tensor has many steps, because TensorBoard keeps only a random sample of a tag's tensors.

    Args:
        summary_writer: a `torch.utils.tensorboard.SummaryWriter`. `close` flushes it but does not close it.

    Raises:
        ValueError: its directory holds a record of a newer version.
    """

    def __init__(self, summary_writer: Any) -> None:
        self._writer = summary_writer
        self._described: set[str] = set()
        # The description of a tag cannot change, so a new list of layers needs new tags. This also holds after a resume
        # into the same directory, so the existing tags are read.
        self._suffixes: dict[str, dict[tuple[str, ...], str]] = {}
        for _, value, content in tensors(Path(summary_writer.log_dir)):
            if "series" in content:
                name = f"{PLUGIN_NAME}/{content['series']}"
                suffixes = self._suffixes.setdefault(content.get("companion", ""), {})
                suffixes[tuple(content["layers"])] = value.tag.removeprefix(name)

    def write_block(self, block: Block) -> None:
        """Write one tensor for each series."""
        if not block.num_steps:
            return
        suffixes = self._suffixes.setdefault(block.companion, {})
        suffix = suffixes.setdefault(block.layers, f"@{len(suffixes) + 1}" if suffixes else "")
        for name, values in block.series.items():
            content = {"series": name, "layers": block.layers, "axes": AXES[: values.ndim]}
            if block.companion:
                content["companion"] = block.companion
            self._write(block.last_step, f"{name}{suffix}", values, content)
        self._writer.flush()  # else it keeps data back for two minutes, and a killed run would lose it

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        """Write one string tensor under `stabnorm/event/<kind>`."""
        self._write(step, f"event/{kind}", dumps(data).encode(), {"event": kind})
        self._writer.flush()

    def close(self) -> None:
        """Flush the writer."""
        self._writer.flush()

    def _write(self, step: int, name: str, tensor: Any, content: Mapping[str, Any]) -> None:
        summary = tensor_summary(f"{PLUGIN_NAME}/{name}", tensor, None if name in self._described else content)
        self._described.add(name)
        self._writer._get_file_writer().add_summary(summary, step)  # torch has no public way to write a tensor


class FileRecord:
    """Writes a directory of its own: `record.json`, numbered `block-*.npz`, and `events.jsonl`.

    A run that is killed leaves no half block, and a resumed run goes on in the same directory.

    Args:
        directory: made if it does not exist.

    Raises:
        ValueError: the directory holds a record of a newer version, or is not on this machine (``s3://``).
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = local_folder(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        header = self._directory / "record.json"
        if header.exists():
            check_version(json.loads(header.read_text(encoding="utf-8")), header)
        written = [int(path.stem.rpartition("-")[2]) for path in self._directory.glob("block-*.npz")]
        self._numbers = itertools.count(max(written, default=0) + 1)
        events = self._directory / "events.jsonl"
        events.touch()
        os.truncate(events, events.read_bytes().rfind(b"\n") + 1)  # remove half a line that a killed run left
        self._events = events.open("a", encoding="utf-8")
        self._write(header, json.dumps({"version": VERSION}).encode())

    def write_block(self, block: Block) -> None:
        """Write one file, which appears only when it is complete."""
        members: dict[str, Any] = {"@steps": np.array([block.first_step, block.num_steps]), **block.series}
        members["@layers"] = np.array(block.layers, str)
        if block.companion:
            members["@companion"] = np.array(block.companion)
        np.savez(file := io.BytesIO(), **members)
        self._write(self._directory / f"block-{next(self._numbers):08d}.npz", file.getvalue())

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        """Append one line and flush it."""
        self._events.write(dumps({"kind": kind, "step": step, "data": data}) + "\n")
        self._events.flush()

    def close(self) -> None:
        """Close the events; the blocks are on disk already."""
        self._events.close()

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        half = path.with_suffix(".tmp")
        half.write_bytes(content)
        os.replace(half, path)


def read_record(path: str | os.PathLike[str], series: Collection[str] | None = None, companion: str = "") -> Record:
    """Read what a run has written so far. If a step was written twice, as after a resume, the last version counts.

    Args:
        path: the directory of a `FileRecord`, a directory with TensorBoard's event files, or one that holds the first.
        series: names of the series to read; names that the record does not have are ignored. Default: all.
        companion: name of a companion whose series are read, such as "attention"; its rows are the layers of the
            result. Default: the series of the norms.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: the record is of a newer version than this package reads, or is not on this machine (``s3://``).
    """
    directory = local_folder(path)
    if (directory / PLUGIN_NAME / "record.json").exists():
        directory = directory / PLUGIN_NAME
    read = _read_files if (directory / "record.json").exists() else _read_tensorboard
    parts, events = read(directory, series)
    parts = [part for part in parts if part.companion == companion]
    layers = tuple(dict.fromkeys(itertools.chain.from_iterable(part.layers for part in parts)))
    spans = [np.arange(part.first_step, part.first_step + part.num_steps) for part in parts]
    steps = np.unique(np.concatenate(spans)) if spans else np.empty(0, np.int64)
    names = dict.fromkeys(itertools.chain.from_iterable(part.series for part in parts))
    once = {dumps(event): event for event in events}  # a resumed run may write an event again
    stitched = {name: _stitch(name, parts, steps, layers) for name in names}
    return Record(layers, steps, stitched, sorted(once.values(), key=lambda event: event.step))


class _Part(NamedTuple):
    """The part of a block that was read. It has its steps even without series, so that `Record.steps` is complete."""

    first_step: int
    num_steps: int
    layers: tuple[str, ...]
    series: Mapping[str, Array]
    companion: str


def _read_files(directory: Path, wanted: Collection[str] | None) -> tuple[list[_Part], list[Event]]:
    header = directory / "record.json"
    check_version(json.loads(header.read_text(encoding="utf-8")), header)
    parts = []
    for path in sorted(directory.glob("block-*.npz")):
        try:
            with path.open("rb") as file, np.load(file) as block:  # loads a member only when it is accessed
                names = [name for name in block.files if name[0] != "@" and (wanted is None or name in wanted)]
                first_step, num_steps = block["@steps"].tolist()
                series = {name: block[name] for name in names}
                companion = str(block["@companion"]) if "@companion" in block.files else ""
                parts.append(_Part(first_step, num_steps, tuple(map(str, block["@layers"])), series, companion))
        except (zipfile.BadZipFile, EOFError):  # after a power failure the file may have a name but no data
            warnings.warn(f"{path} is damaged; its steps are left out", stacklevel=3)
    lines = (directory / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return parts, [Event(**json.loads(line)) for line in lines if line.endswith("\n")]  # the last may be half a line


def _read_tensorboard(directory: Path, wanted: Collection[str] | None) -> tuple[list[_Part], list[Event]]:
    from tensorboard.util.tensor_util import make_ndarray

    parts, events = [], []
    for step, value, content in tensors(directory):
        if "event" in content:
            events.append(Event(content["event"], step, json.loads(make_ndarray(value.tensor).item())))
            continue
        name = content["series"]
        num_steps = value.tensor.tensor_shape.dim[0].size
        series = {name: make_ndarray(value.tensor)} if wanted is None or name in wanted else {}
        companion = content.get("companion", "")
        parts.append(_Part(step - num_steps + 1, num_steps, tuple(content["layers"]), series, companion))
    if not parts and not events:
        raise FileNotFoundError(
            f"no record in {directory}: neither record.json nor event files (*tfevents*) with tags {PLUGIN_NAME}/*; "
            "give the directory that the run wrote to"
        )
    return parts, events


def _stitch(name: str, parts: Iterable[_Part], steps: npt.NDArray[np.int64], layers: Sequence[str]) -> Array:
    """Combine the parts of one series; later parts overwrite earlier ones."""
    parts = [part for part in parts if name in part.series]
    shapes = [part.series[name].shape for part in parts]
    # The layers and k may change on a resume; a value that one of the runs does not have is NaN.
    column = {layer: i for i, layer in enumerate(layers)}
    trailing = [max(sizes) for sizes in zip(*(shape[2:] for shape in shapes), strict=True)]
    out = np.full((len(steps), len(layers), *trailing)[: len(shapes[0])], np.nan, np.float32)
    for part, shape in zip(parts, shapes, strict=True):
        rows = out[int(np.searchsorted(steps, part.first_step)) :][: part.num_steps]
        rows[...] = np.nan
        where: tuple[Any, ...] = (slice(None), [column[layer] for layer in part.layers], *map(slice, shape[2:]))
        rows[where[: len(shape)]] = part.series[name]
    return out
