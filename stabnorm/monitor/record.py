"""The record of a run, which is all that a dashboard reads. It is in TensorBoard's files or in files of our own.

A flush adds a `Block` of contiguous steps. Something that happens at a single step, such as an alert, is an event.
Shapes are [step], [step, layer] or [step, layer, rank], the last one for the k largest of something. Everything is
float32.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from stabnorm._checks import check_all, check_instance, wrong_type
from stabnorm._log import logger
from stabnorm.monitor._folders import beside, create_file, local_folder, record_folder, remove_drafts, replace_file
from stabnorm.monitor._parts import AXES as AXES
from stabnorm.monitor._parts import Array, Part, stitched
from stabnorm.monitor._parts import check_shape as check_shape
from stabnorm.monitor._record_files import (
    StepFile,
    header_fault,
    pack_block,
    pack_line,
    remove_half_line,
    step_files,
    stored_parts,
    unpack_line,
    whole_lines,
)
from stabnorm.monitor._record_format import PLUGIN_NAME as PLUGIN_NAME
from stabnorm.monitor._record_format import VERSION as VERSION
from stabnorm.monitor._record_format import dumps, event_files, tensor_summary, tensors
from stabnorm.monitor._thinning import MOST_BYTES as MOST_BYTES
from stabnorm.monitor._thinning import check_most_bytes as check_most_bytes
from stabnorm.monitor._thinning import live_files, thin, whole_bytes

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
    """Writes a directory of its own: `record.json`, numbered `block-*.npz` and `thin-*.npz`, and `events.jsonl`.

    A run that is killed leaves no half block, and a resumed run goes on in the same directory. Blocks and events carry
    checksums, so that a reader notices what a disk has damaged. If two runs write into one directory at a time, each
    keeps its blocks, and both say so.

    A record of more than about `most_bytes` is thinned: the newest steps, which take half of it, stay as they are;
    older ones go into buckets of 16 steps, still older ones into buckets of 64, and so on. Of a bucket the smallest and
    the largest value of each layer stay at their steps, and the other steps get the mean of the others. No step is
    missing.

    Args:
        directory: made if it does not exist, and made again if somebody removes it while the run goes on.
        most_bytes: what the steps may take on the disk, 1 MiB at least. None keeps every value. Default: 256 MiB.

    Raises:
        ValueError: the directory holds a record of a newer version or of another tool, or is not on this machine
            (``s3://``); `most_bytes` is below 1 MiB.
    """

    def __init__(self, directory: str | os.PathLike[str], most_bytes: int | None = MOST_BYTES) -> None:
        check_most_bytes("most_bytes", most_bytes)
        self._most_bytes = most_bytes
        self._directory = local_folder(directory)
        self._header, self._events = self._directory / "record.json", self._directory / "events.jsonl"
        self._alone = True
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._header.exists() and (fault := header_fault(self._header)):
            logger.warning("stabnorm: %s %s, and is written anew", self._header, fault)
            self._header.unlink()
        remove_drafts(self._directory, "block-*")
        remove_drafts(self._directory, "thin-*")
        self._numbers = itertools.count(max((file.last for file in live_files(self._directory)), default=0) + 1)
        self._whole_bytes = whole_bytes(self._directory)
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
        content = pack_block(Part(block.first_step, block.num_steps, block.layers, block.series, block.companion))
        while True:
            path = self._directory / f"block-{next(self._numbers):08d}.npz"
            try:
                create_file(path, content)
                break
            except FileExistsError:
                if self._alone:
                    self._alone = False
                    logger.warning(
                        "stabnorm: another run writes its record into %s, too. Both are kept, but they are read as one "
                        "run: give each run a directory of its own",
                        self._directory,
                    )
        self._whole_bytes += len(content)
        if self._most_bytes is not None and self._alone and self._whole_bytes > self._most_bytes // 2:
            self._thin(self._most_bytes)

    def _thin(self, most_bytes: int) -> None:
        """Thin the oldest steps; where that is impossible, say so once, and let the record grow."""
        try:
            self._whole_bytes = thin(self._directory, most_bytes)
        except Exception as error:
            self._most_bytes = None
            logger.warning("stabnorm: the old steps in %s are not thinned any more: %s", self._directory, error)

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
    directory = record_folder(local_folder(path))
    of_files = (directory / "record.json").exists() or bool(step_files(directory)[0])
    if of_files:
        parts, events = _read_files(directory, series)
        if event_files(beside(directory)):  # in which the record began, if it was another version that began it
            first = min((part.first_step for part in parts), default=math.inf)
            began, earlier = _read_tensorboard(beside(directory), series)
            parts = [part for part in began if part.first_step < first] + parts
            events = [event for event in earlier if event.step < first] + events
    else:
        parts, events = _read_tensorboard(directory, series)
        if not parts and not events:
            raise FileNotFoundError(
                f"no record in {directory}: neither record.json nor event files (*tfevents*) with tags "
                f"{PLUGIN_NAME}/*; give the directory that the run wrote to"
            )
    layers, steps, found = stitched([part for part in parts if part.companion == companion])
    once = {dumps(event): event for event in events}  # a resumed run may write an event again
    return Record(layers, steps, found, sorted(once.values(), key=lambda event: event.step))


def _read_files(directory: Path, wanted: Collection[str] | None) -> tuple[list[Part], list[Event]]:
    header = directory / "record.json"
    if fault := header_fault(header):
        warnings.warn(f"{header} {fault}; the rest of the record is read", stacklevel=3)
    parts, events = [], []
    for path in sorted(directory.glob("block-*.npz")):
        if StepFile.of(path) is None:
            warnings.warn(f"{path} has not the name of a block; it is left out", stacklevel=3)
    for file in step_files(directory)[0]:
        try:
            parts += [part.read(wanted) for part in stored_parts(file.path.read_bytes())]
        except Exception as error:  # a damaged file of a zip archive can raise almost anything
            warnings.warn(f"{file.path} is damaged; its steps are left out: {error}", stacklevel=3)
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


def _event(kind: str, step: int, data: Mapping[str, Any]) -> Event:
    if not isinstance(kind, str) or not isinstance(step, int) or not isinstance(data, Mapping):
        raise TypeError(f"an event has a kind, a step and data, got {kind!r}, {step!r} and {data!r}")
    return Event(kind, step, data)


def _read_tensorboard(directory: Path, wanted: Collection[str] | None) -> tuple[list[Part], list[Event]]:
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
            part = Part(step - num_steps + 1, num_steps, tuple(content["layers"]), series, companion)
            parts.append(part.checked())
        except (IndexError, TypeError, ValueError):
            strange.add(value.tag)
    if strange:
        names = ", ".join(sorted(strange))
        warnings.warn(f"{directory}: values of {names} are not as their tags describe them; left out", stacklevel=3)
    return parts, events
