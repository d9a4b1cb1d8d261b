"""Old steps of a record in files are thinned, so that a record keeps a bound however long the run is.

Half of the bound holds the newest steps, every one of them. The steps before them lie in buckets of 16 and have a
quarter of the bound, those before in buckets of 64 and have an eighth, and so on: the older, the coarser. As buckets
grow faster than their share shrinks, a level has more steps than the newer one, so few levels are needed. What a bucket
keeps is in `stabnorm.monitor._buckets`.
"""

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabnorm._checks import check_count
from stabnorm._log import logger
from stabnorm.monitor._buckets import RANKED, Buckets, in_buckets
from stabnorm.monitor._folders import create_file
from stabnorm.monitor._parts import Part, stitched
from stabnorm.monitor._record_files import StepFile, StoredPart, pack_thinned, step_files, stored_parts

MOST_BYTES = 256 << 20
LEAST_BYTES = 1 << 20  # below, what describes the steps would take more than the steps
_SIZES = (1, *(16 * 4**level for level in range(9)))  # steps of a bucket, level by level
_LEAST_SHARE = 128  # the part of the bound that a level has at least
_PIECES = 8  # of a level's share, one of which is thinned at a time


def check_most_bytes(name: str, value: Any) -> None:
    """Check what the steps of a record may take on the disk, the argument of this name; None is no bound.

    Raises:
        TypeError: it is no number of bytes.
        ValueError: it is below 1 MiB.
    """
    if value is not None:
        check_count(name, value, LEAST_BYTES, hint=": what the record may take on the disk, or None")


def thin(directory: Path, most_bytes: int) -> int:
    """Thin the oldest steps of a record as far as its bound asks for, and return the bytes of those that are whole.

    A new file takes the place of several, appears when it is complete, and the others are removed afterwards. A reader,
    also of a run that was killed in between, finds each step once: whole, or in its bucket.
    """
    for level, (size, coarser) in enumerate(itertools.pairwise(_SIZES)):
        files = [file for file in live_files(directory) if file.size == size]
        total, share = _bytes(files), max(most_bytes >> (level + 1), most_bytes // _LEAST_SHARE)
        while len(files) > 1 and total > share:
            piece = _piece(files, share / _PIECES)
            total -= _bytes(piece)
            files = files[len(piece) :]
            _replace(piece, StepFile.thinned(piece, coarser))
    return whole_bytes(directory)


def live_files(directory: Path) -> list[StepFile]:
    """Return the files of steps of a record, and remove those whose place another one has taken."""
    files, replaced = step_files(directory)
    for file in replaced:
        with contextlib.suppress(OSError):  # somebody reads it, or has removed it
            file.path.unlink()
    return files


def whole_bytes(directory: Path) -> int:
    """Return the bytes of the steps that are not thinned."""
    return _bytes([file for file in step_files(directory)[0] if file.size == 1])


def _bytes(files: Sequence[StepFile]) -> int:
    return sum(file.path.stat().st_size for file in files)


def _piece(files: Sequence[StepFile], wanted: float) -> list[StepFile]:
    """Return the oldest files that have so many bytes together, two at least if there are two."""
    sizes = itertools.accumulate(file.path.stat().st_size for file in files)
    count = next((count for count, size in enumerate(sizes, 1) if size >= wanted), len(files))
    return list(files[: max(2, count)])


def _replace(files: Sequence[StepFile], thinned: StepFile) -> None:
    parts: list[StoredPart] = []
    for file in files:
        try:
            parts += stored_parts(file.path.read_bytes())
        except Exception as error:  # a damaged file of a zip archive can raise almost anything
            logger.warning("stabnorm: %s is damaged, and is kept beside the record: %s", file.path, error)
            file.path.rename(file.path.with_suffix(".damaged"))
    thin_parts = [part for alike in _alike(parts) for part in _thinned(alike, thinned.size)]
    if thin_parts:
        create_file(thinned.path, pack_thinned(thin_parts, thinned.size))
    live_files(thinned.path.parent)


def _alike(parts: Sequence[StoredPart]) -> list[list[StoredPart]]:
    """Group parts that have the same rows, in the order in which they were written."""
    by_companion = sorted(parts, key=lambda part: part.companion)
    return [list(group) for _, group in itertools.groupby(by_companion, lambda part: (part.companion, part.layers))]


def _thinned(parts: Sequence[StoredPart], size: int) -> list[tuple[Part, dict[str, Buckets]]]:
    """Return a part and its series in buckets for each stretch of steps without a gap."""
    names = list(dict.fromkeys(name for part in parts for name in part.names))
    _, steps, _ = stitched([part.read(()) for part in parts])
    ends = [0, *(np.flatnonzero(np.diff(steps) != 1) + 1).tolist(), len(steps)]
    stretches = [(begin, end) for begin, end in itertools.pairwise(ends) if end > begin]
    found = [
        (Part(int(steps[begin]), end - begin, parts[0].layers, {}, parts[0].companion), dict[str, Buckets]())
        for begin, end in stretches
    ]
    # Series by series, because thinned steps take much more memory when they are opened.
    for together in (RANKED, *((name,) for name in names if name not in RANKED)):
        series = stitched([part.read(together) for part in parts])[2]
        for (begin, end), (part, thinned) in zip(stretches, found, strict=True):
            within = {name: values[begin:end] for name, values in series.items()}
            thinned.update(in_buckets(within, part.first_step, size))
    return found
