"""The record of a run, which is all that a dashboard reads. It is in TensorBoard's files or in files of our own.

A flush adds a `Block` of contiguous steps. Something that happens at a single step, such as an alert, is an event.
Shapes are [step], [step, layer] or [step, layer, rank], the last one for the k largest of something. Everything is
float32.
"""

import contextlib
import functools
import itertools
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from stabnorm._checks import check_all, check_instance, wrong_type
from stabnorm._log import logger
from stabnorm.monitor._folders import FOLDER, create_file, local_folder, remove_drafts, replace_file
from stabnorm.monitor._record_files import (
    block_number,
    header_fault,
    pack_arrays,
    pack_line,
    remove_half_line,
    unpack_arrays,
    unpack_line,
    whole_lines,
)
from stabnorm.monitor._record_format import PLUGIN_NAME as PLUGIN_NAME
from stabnorm.monitor._record_format import VERSION as VERSION
from stabnorm.monitor._record_format import dumps, tensor_summary, tensors

AXES = ("step", "layer", "rank")

# The series that a record may have besides the statistics of the catalogue: name -> (axes, meaning).
SIDE_SERIES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "loss": (AXES[:1], "training loss"),
    "learning_rate": (AXES[:1], "learning rate of the first parameter group"),
    "gradient_norm": (AXES[:1], "norm of the gradient over all parameters, before clipping"),
    "weight_decay": (AXES[:1], "largest weight decay of the parameter groups"),
    "loss_scale": (AXES[:1], "factor by which the loss was scaled"),
    "measured_every": (AXES[:1], "steps from one measurement of the costly statistics to the next, under a budget"),
    "tokens": (AXES[:2], "valid tokens the layer saw; 0 where it did not run"),
    "top_channel_ids": (AXES, "channels with the largest magnitude, largest first"),
    "top_channel_values": (AXES, "their magnitudes"),
    "lam": (AXES[:2], "share of LayerNorm in a progressive norm, 1 -> 0"),
    "branch_gap": (AXES[:2], "relative distance between a progressive norm's two branches"),
}
EVENT_KINDS: Mapping[str, str] = {
    "alert": "a statistic crossed its threshold",
    "action": "what was done at an alarm, and why",
    "onset": "alerts that belong together, and what is known of their cause; written again as it grows",
    "announced": "a change of the training that was announced",
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
        for name, values in self.series.items():
            check_shape(name, values, self.num_steps, len(self.layers))

    @functools.cached_property
    def num_steps(self) -> int:
        """The number of steps in the block."""
        return max((len(values) for values in self.series.values() if values.ndim), default=0)

    @property
    def last_step(self) -> int:
        """The step of the last row."""
        return self.first_step + self.num_steps - 1


def check_shape(name: str, values: npt.NDArray[Any], num_steps: int, num_layers: int) -> None:
    """Check the shape of a series.

    Raises:
        ValueError: the series is none of so many steps and layers.
    """
    if not 1 <= values.ndim <= len(AXES) or values.shape[:2] != (num_steps, num_layers)[: values.ndim]:
        raise ValueError(
            f"series {name!r} has shape {values.shape} in a block of {num_steps} steps and {num_layers} layers; "
            "give it as [steps], [steps, layers] or [steps, layers, k]"
        )


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
        if not hasattr(summary_writer, "log_dir"):
            raise wrong_type("summary_writer", summary_writer, "a torch.utils.tensorboard.SummaryWriter")
        self._writer = summary_writer
        self._values: dict[str, int] = {}  # of each tag, in the current event file
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
        self._flush()

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        """Write one string tensor under `stabnorm/event/<kind>`."""
        self._write(step, f"event/{kind}", dumps(data).encode(), {"event": kind})
        self._flush()

    def close(self) -> None:
        """Flush the writer."""
        self._flush()

    def _flush(self) -> None:
        """Without this the writer keeps data back for two minutes, and a killed run would lose it."""
        with self._another_file_after_an_error():
            self._writer.flush()

    def _write(self, step: int, name: str, tensor: Any, content: Mapping[str, Any]) -> None:
        # The description of a tag is repeated at its 2nd, 4th, 8th, ... value: the first one may be damaged.
        values = self._values[name] = self._values.get(name, 0) + 1
        described = content if values & (values - 1) == 0 else None
        summary = tensor_summary(f"{PLUGIN_NAME}/{name}", tensor, described)
        with self._another_file_after_an_error():
            self._writer._get_file_writer().add_summary(summary, step)  # torch has no public way to write a tensor

    @contextlib.contextmanager
    def _another_file_after_an_error(self) -> Iterator[None]:
        """After an error, let the next call begin another event file.

        TensorBoard's writer has a thread that an error ends, and raises the same error for ever after.
        """
        try:
            yield
        except Exception:
            broken = list((self._writer.all_writers or {}).values())
            self._writer.file_writer = self._writer.all_writers = None
            self._values.clear()
            for writer in broken:
                with contextlib.suppress(Exception):
                    writer.close()
            raise


class FileRecord:
    """Writes a directory of its own: `record.json`, numbered `block-*.npz`, and `events.jsonl`.

    A run that is killed leaves no half block, and a resumed run goes on in the same directory. Blocks and events carry
    checksums, so that a reader notices what a disk has damaged. If two runs write into one directory at a time, each
    keeps its blocks, and both say so.

    Args:
        directory: made if it does not exist, and made again if somebody removes it while the run goes on.

    Raises:
        ValueError: the directory holds a record of a newer version or of another tool, or is not on this machine
            (``s3://``).
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = local_folder(directory)
        self._header, self._events = self._directory / "record.json", self._directory / "events.jsonl"
        self._alone = True
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._header.exists() and (fault := header_fault(self._header)):
            logger.warning("stabnorm: %s %s, and is written anew", self._header, fault)
            self._header.unlink()
        remove_drafts(self._directory, "block-*")
        written = [block_number(path) or 0 for path in self._directory.glob("block-*.npz")]
        self._numbers = itertools.count(max(written, default=0) + 1)
        self._prepare()

    def _prepare(self) -> None:
        """Make what every write needs: somebody may have swept the directory away."""
        if not self._header.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            replace_file(self._header, json.dumps({"version": VERSION}).encode())
        remove_half_line(self._events)

    def write_block(self, block: Block) -> None:
        """Write one file, which appears only when it is complete and on the disk."""
        self._prepare()
        arrays: dict[str, Any] = {"@steps": np.array([block.first_step, block.num_steps]), **block.series}
        arrays["@layers"] = np.array(block.layers, str)
        if block.companion:
            arrays["@companion"] = np.array(block.companion)
        content = pack_arrays(arrays)
        while True:
            path = self._directory / f"block-{next(self._numbers):08d}.npz"
            try:
                return create_file(path, content)
            except FileExistsError:
                if self._alone:
                    self._alone = False
                    logger.warning(
                        "stabnorm: another run writes its record into %s, too. Both are kept, but they are read as one "
                        "run: give each run a directory of its own",
                        self._directory,
                    )

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        """Append one line and flush it."""
        self._prepare()
        with self._events.open("ab") as file:
            file.write(pack_line({"kind": kind, "step": step, "data": data}))

    def close(self) -> None:
        """Do nothing, because everything is on disk already."""


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
    check_instance("companion", companion, str, "a companion's name, or leave it out")
    if series is not None:
        check_all("series", series, str, "a list of names")
    directory = local_folder(path)
    for name in (FOLDER, PLUGIN_NAME):  # the second one is what the folder was called at first
        if (directory / name / "record.json").exists():
            directory = directory / name
    of_files = (directory / "record.json").exists() or any(directory.glob("block-*.npz"))
    read = _read_files if of_files else _read_tensorboard
    parts, events = read(directory, series)
    parts = [part for part in parts if part.companion == companion]
    layers = tuple(dict.fromkeys(itertools.chain.from_iterable(part.layers for part in parts)))
    spans = [np.arange(part.first_step, part.first_step + part.num_steps) for part in parts]
    steps = np.unique(np.concatenate(spans)) if spans else np.empty(0, np.int64)
    having: dict[str, list[_Part]] = {}
    for part in parts:
        for name in part.series:
            having.setdefault(name, []).append(part)
    once = {dumps(event): event for event in events}  # a resumed run may write an event again
    stitched = {name: _stitch(name, parts, steps, layers) for name, parts in having.items()}
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
    if fault := header_fault(header):
        warnings.warn(f"{header} {fault}; the rest of the record is read", stacklevel=3)
    parts, events = [], []
    for path in sorted(directory.glob("block-*.npz")):
        if block_number(path) is None:
            warnings.warn(f"{path} has not the name of a block; it is left out", stacklevel=3)
            continue
        try:
            parts.append(_unpack(path.read_bytes(), wanted))
        except Exception as error:  # a damaged file of a zip archive can raise almost anything
            warnings.warn(f"{path} is damaged; its steps are left out: {error}", stacklevel=3)
    broken = 0
    for line in whole_lines(directory / "events.jsonl"):
        try:
            events.append(_event(**unpack_line(line)))
        except (TypeError, ValueError):  # no JSON, or other keys
            broken += 1
    if broken:
        lines = f"{broken} broken line{'s'[: broken > 1]}"
        warnings.warn(f"{directory / 'events.jsonl'} has {lines}; they are left out", stacklevel=3)
    return parts, events


def _unpack(content: bytes, wanted: Collection[str] | None) -> _Part:
    with unpack_arrays(content) as block:  # loads an array only when it is accessed
        names = [name for name in block.files if name[0] != "@" and (wanted is None or name in wanted)]
        first_step, num_steps = block["@steps"].tolist()
        series = {name: block[name] for name in names}
        companion = str(block["@companion"]) if "@companion" in block.files else ""
        return _checked(_Part(first_step, num_steps, tuple(map(str, block["@layers"])), series, companion))


def _checked(part: _Part) -> _Part:
    for name, values in part.series.items():
        check_shape(name, values, part.num_steps, len(part.layers))
    return part


def _event(kind: str, step: int, data: Mapping[str, Any]) -> Event:
    if not isinstance(kind, str) or not isinstance(step, int) or not isinstance(data, Mapping):
        raise TypeError(f"an event has a kind, a step and data, got {kind!r}, {step!r} and {data!r}")
    return Event(kind, step, data)


def _read_tensorboard(directory: Path, wanted: Collection[str] | None) -> tuple[list[_Part], list[Event]]:
    from tensorboard.util.tensor_util import make_ndarray

    parts, events, strange = [], [], set()
    for step, value, content in tensors(directory):
        try:
            if "event" in content:
                events.append(_event(content["event"], step, json.loads(make_ndarray(value.tensor).item())))
                continue
            name = content["series"]
            num_steps = value.tensor.tensor_shape.dim[0].size
            series = {name: make_ndarray(value.tensor)} if wanted is None or name in wanted else {}
            companion = content.get("companion", "")
            part = _Part(step - num_steps + 1, num_steps, tuple(content["layers"]), series, companion)
            parts.append(_checked(part))
        except (IndexError, TypeError, ValueError):
            strange.add(value.tag)
    if strange:
        names = ", ".join(sorted(strange))
        warnings.warn(f"{directory}: values of {names} are not as their tags describe them; left out", stacklevel=3)
    if not parts and not events:
        raise FileNotFoundError(
            f"no record in {directory}: neither record.json nor event files (*tfevents*) with tags {PLUGIN_NAME}/*; "
            "give the directory that the run wrote to"
        )
    return parts, events


def _stitch(name: str, parts: Sequence[_Part], steps: npt.NDArray[np.int64], layers: Sequence[str]) -> Array:
    """Combine the parts of one series; later parts overwrite earlier ones."""
    axes = parts[-1].series[name].ndim  # a series may have got another meaning; only the last one can be told
    parts = [part for part in parts if part.series[name].ndim == axes]
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
