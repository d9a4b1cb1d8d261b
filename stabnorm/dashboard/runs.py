"""Find runs below a folder, and read their records bit by bit while they grow.

A record may be larger than the memory: a `Run` keeps where each tensor lies in its file, and reads a series when it is
asked for. What cannot be read is left out, and said in `Run.notes`.
"""

import itertools
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stabnorm.dashboard.definitions import definition
from stabnorm.dashboard.readers import EventReader, FileReader, Piece, Reader, RunReader
from stabnorm.monitor._folders import FOLDER, beside, record_folder, run_name
from stabnorm.monitor._record_files import step_files
from stabnorm.monitor._record_format import PLUGIN_NAME
from stabnorm.monitor.baseline import Baseline
from stabnorm.monitor.record import SIDE_SERIES, Event, check_shape

Array = npt.NDArray[np.float32]

CACHE_BYTES = 256 * 2**20  # of series in memory, for each run
_BASELINES = 40  # in memory, for each run
_SKIPPED = re.compile(r"checkpoints|\.git|__pycache__|wandb-core")


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
        reader: where the record comes from.

    Attributes:
        events: alerts and others, in the order of their steps, each one once.
        version: a number that grows when `refresh` has found something new.

    Example:
        >>> from stabnorm.dashboard.readers import MemoryReader
        >>> history = MemoryReader({"": (("norm",), np.arange(3), {"amax": np.ones((3, 1))})})
        >>> run = Run("mine", history)
        >>> run.refresh(), run.rows().layers, run.statistics()
        (True, ('norm',), ['amax'])
    """

    def __init__(self, name: str, reader: Reader) -> None:
        self.name = name
        self.events: list[Event] = []
        self.version = 0
        self._pieces: dict[tuple[str, str], list[Piece]] = {}
        self._reader = reader
        self._rows: dict[str, Rows] = {}
        self._cache = OrderedDict[tuple[str, str], Array]()
        self._baselines: dict[tuple[str, str], Baseline] = {}
        self._gaps: dict[tuple[str, str], tuple[int, int] | None] = {}
        self._known_events: set[str] = set()

    def __bool__(self) -> bool:
        """Whether there is a record at all."""
        return bool(self._pieces or self.events)

    def refresh(self) -> bool:
        """Read what was written since the last time, and return whether there was anything."""
        new = list(self._reader.pieces())
        if self._reader.begins_again:
            self._pieces.clear()
        for companion, name, piece in new:
            self._pieces.setdefault((companion, name), []).append(piece)
        found = bool(new)
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
            self._baselines.clear()
            self._gaps.clear()
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
        if thinned := [piece for piece in self._pieces_of("") if piece.bucket > 1]:
            end, size = max(p.first_step + p.num_steps for p in thinned), max(p.bucket for p in thinned)
            notes.append(
                f"Steps before {end:,} are thinned: of up to {size:,} steps in a row each layer's smallest and largest "
                "value stand at their steps, and a mean at the others."
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
            lists = {id(piece.layers): piece.layers for piece in pieces}  # the pieces of a reader share their tuples
            layers = tuple(dict.fromkeys(itertools.chain.from_iterable(lists.values())))
            spans = {(piece.first_step, piece.num_steps) for piece in pieces}
            ranges = [np.arange(first, first + count) for first, count in sorted(spans)]
            steps = np.unique(np.concatenate(ranges)) if ranges else np.empty(0, np.int64)
            self._rows[companion] = Rows(layers, steps)
        return self._rows[companion]

    def series(self, name: str, companion: str = "") -> Array | None:
        """Return a series, ``[steps, ...]``, NaN where there is no value; None if the record does not have it."""
        if (companion, name) not in self._pieces:
            return None
        return self._kept((companion, name), lambda: self._whole(name, companion))

    def _whole(self, name: str, companion: str) -> Array:
        """Return a series of all pieces; where a budget spared a statistic, its last value stands."""
        values = self._stitch(self._pieces[companion, name], self.rows(companion))
        every = None if companion or name in SIDE_SERIES else self.series("measured_every")
        if every is None:
            return values
        steps = self.rows(companion).steps
        gaps = every[spared_steps(every, steps) & np.isnan(values).reshape(len(values), -1).all(1)]
        self._gaps[companion, name] = (int(gaps.min()), int(gaps.max())) if gaps.size else None
        return between_measurements(values, every, steps)

    def measured_every(self, name: str, companion: str = "") -> tuple[int, int] | None:
        """Return how many steps lie between two measurements of a statistic that a budget spared, least and most."""
        self.series(name, companion)
        return self._gaps.get((companion, name))

    def baseline(self, name: str, companion: str = "") -> Baseline:
        """Return what was usual in a series of the record, ``[steps, layers]``."""
        if (companion, name) not in self._baselines:
            values = self.series(name, companion)
            assert values is not None
            what = definition(name)
            baseline = Baseline(values.shape[1], what.floor, what.negligible)
            baseline.extend(values)
            self._baselines[companion, name] = baseline
            if len(self._baselines) > _BASELINES:
                self._baselines.pop(next(iter(self._baselines)))
        return self._baselines[companion, name]

    def _kept(self, key: tuple[str, str], make: Callable[[], Array]) -> Array:
        """Return a series from memory, where the ones that were used last are kept."""
        if key not in self._cache:
            self._cache[key] = make()
            while len(self._cache) > 1 and sum(values.nbytes for values in self._cache.values()) > CACHE_BYTES:
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


def open_run(name: str, directory: Path) -> Run:
    """Return the run whose record lies in a folder: the files of a `FileRecord`, or TensorBoard's event files.

    Args:
        name: what a page calls it.
        directory: the folder with the files, or the run's folder that holds it.
    """
    directory = record_folder(directory)
    of_files = (directory / "record.json").exists() or bool(step_files(directory)[0])
    if of_files:
        return Run(name, RunReader(FileReader(directory), EventReader(beside(directory))))
    return Run(name, EventReader(directory))


def run_folders(root: Path) -> dict[str, Path]:
    """Return the folders below ``root`` (and itself) that may hold a record, by the name that a page gives the run.

    Example:
        >>> run_folders(Path("no_such_folder"))
        {}
    """
    folders: dict[str, Path] = {}
    visited: set[str] = set()  # links may lead in a circle
    for directory, inner, names in os.walk(root, followlinks=True):
        path = Path(directory)
        real = os.path.realpath(path)
        inner[:] = [] if real in visited else sorted(name for name in inner if not _SKIPPED.fullmatch(name))
        if real not in visited and any(_of_a_record(name) for name in names):
            run = path.parent if path.name in (PLUGIN_NAME, FOLDER) and path != root else path
            name = run.relative_to(root).as_posix()
            folders[name if "/" in name else run_name(root.resolve() / name)] = path
        visited.add(real)
    return folders


def _of_a_record(name: str) -> bool:
    return name == "record.json" or "tfevents" in name or name.startswith(("block-", "thin-"))


def spared_steps(every: Array, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return the steps at which a budget spared what is costly, from ``measured_every`` of the record."""
    with np.errstate(invalid="ignore"):
        spared: npt.NDArray[np.bool_] = (every > 1) & (steps % np.maximum(every, 1) != 0)
    return spared


def between_measurements(values: Array, every: Array, steps: npt.NDArray[np.int64]) -> Array:
    """Return ``[steps, rows]`` in which the last value stands in steps that did not measure the statistic.

    Args:
        values: a statistic.
        every: ``[steps]``, from one measurement to the next; NaN where there was no budget.
        steps: the number of each step.

    >>> values = np.array([[1.0], [np.nan], [np.nan], [np.nan]], np.float32)
    >>> between_measurements(values, np.array([3, 3, 3, 3], np.float32), np.arange(4)).ravel()
    array([ 1.,  1.,  1., nan], dtype=float32)
    """
    spared = spared_steps(every, steps)
    if not spared.any():
        return values
    places = np.where(spared[:, None] & np.isnan(values), 0, np.arange(len(values))[:, None])
    held: Array = np.take_along_axis(values, np.maximum.accumulate(places, axis=0), axis=0)
    return held
