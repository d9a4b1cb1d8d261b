"""What lies in the files of a `FileRecord`: arrays and lines with checksums, and a header.

A flush writes ``block-00000007.npz``. Old blocks are thinned: ``thin-00000001-00000006-16.npz`` holds the steps of
blocks 1 to 6 in buckets of 16 steps and takes their place, so that a reader passes over a block that lies in its range.
"""

import functools
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stabnorm.monitor._buckets import Buckets, opened
from stabnorm.monitor._parts import Array, Part
from stabnorm.monitor._record_format import check_version, dumps

_BLOCK = re.compile(r"block-(\d{8,})\.npz")
_THIN = re.compile(r"thin-(\d{8,})-(\d{8,})-(\d+)\.npz")
_NPZ_CHECKSUM = re.compile(rb"crc32:([0-9a-f]{8})")  # the comment of the zip archive
_LINE_CHECKSUM = re.compile(r', "crc32": "([0-9a-f]{8})"\}')
_UNFINISHED = re.compile(rb'\{((?!, "crc32": "[0-9a-f]{8}"\})[ -~])*')  # what is damaged looks otherwise
_COMMENT = 2 + len("crc32:01234567")  # with the two bytes that hold the comment's length


class StepFile(NamedTuple):
    """A file that holds steps.

    Attributes:
        path: the file.
        first: number of its first block.
        last: number of its last block; the first one for a block itself.
        size: steps of a bucket; 1 for a block, which has every step.
    """

    path: Path
    first: int
    last: int
    size: int

    @classmethod
    def of(cls, path: Path) -> "StepFile | None":
        """Return what a file's name says; None for a file of another name, such as a copy.

        >>> StepFile.of(Path("block-00000012.npz"))[1:], StepFile.of(Path("thin-00000001-00000006-16.npz"))[1:]
        ((12, 12, 1), (1, 6, 16))
        >>> StepFile.of(Path("block-00000012 (copy).npz"))
        """
        if match := _BLOCK.fullmatch(path.name):
            return cls(path, int(match[1]), int(match[1]), 1)
        if match := _THIN.fullmatch(path.name):
            return cls(path, int(match[1]), int(match[2]), int(match[3]))
        return None

    @classmethod
    def thinned(cls, files: "Sequence[StepFile]", size: int) -> "StepFile":
        """Return the file that takes the place of files in a row, with buckets of another size."""
        first, last = files[0].first, files[-1].last
        return cls(files[0].path.with_name(f"thin-{first:08d}-{last:08d}-{size}.npz"), first, last, size)


def step_files(directory: Path) -> tuple[list[StepFile], list[StepFile]]:
    """Return the files that hold the steps of a record, in their order, and those whose place another one has taken."""
    found = [StepFile.of(path) for pattern in ("block-*.npz", "thin-*.npz") for path in directory.glob(pattern)]
    # Of two with the same blocks the one with larger buckets was made from the other one.
    files = sorted((file for file in found if file), key=lambda file: (file.first, -file.last, -file.size))
    live: list[StepFile] = []
    replaced: list[StepFile] = []
    for file in files:
        (replaced if live and file.last <= live[-1].last else live).append(file)
    return live, replaced


def pack_arrays(arrays: Mapping[str, Any]) -> bytes:
    """Return the arrays as the content of an ``.npz`` file, whose comment is the checksum of everything before it."""
    np.savez(file := io.BytesIO(), **arrays)
    content = file.getvalue()
    comment = f"crc32:{zlib.crc32(content):08x}".encode()
    return content[:-2] + struct.pack("<H", len(comment)) + comment


def unpack_arrays(content: bytes) -> Any:
    """Return what `pack_arrays` packed, as numpy's lazy mapping. Of an older file numpy checks each array for itself.

    Raises:
        ValueError: the checksum is not that of the content, or the end of the content is missing.
        Exception: whatever numpy raises at a file without a checksum that is damaged, or is none of its own.
    """
    if match := _NPZ_CHECKSUM.fullmatch(content[2 - _COMMENT :]):
        content = content[:-_COMMENT] + b"\0\0"
        if zlib.crc32(content) != int(match[1], 16):
            raise ValueError("its checksum is not that of its content")
    elif content[-22:-18] != b"PK\5\6":  # where the end of a zip archive without a comment begins
        raise ValueError("its end is missing")
    return np.load(io.BytesIO(content))


class StoredPart(NamedTuple):
    """A part as it lies in a file: its arrays are made when they are asked for.

    Attributes:
        names: of its series.
        array: gives one of them, ``[steps, ...]``.
    """

    first_step: int
    num_steps: int
    layers: tuple[str, ...]
    companion: str
    names: tuple[str, ...]
    array: Callable[[str], Array]

    def read(self, wanted: Collection[str] | None) -> Part:
        """Return the part with the series that are wanted; None: with all.

        Raises:
            ValueError: a series has another shape than the part.
        """
        series = {name: self.array(name) for name in self.names if wanted is None or name in wanted}
        return Part(self.first_step, self.num_steps, self.layers, series, self.companion).checked()


def pack_block(part: Part) -> bytes:
    """Return the content of a block's file."""
    arrays: dict[str, Any] = {"@steps": np.array([part.first_step, part.num_steps]), **part.series}
    return pack_arrays(arrays | _described(part, ""))


def pack_thinned(parts: Sequence[tuple[Part, Mapping[str, Buckets]]], size: int) -> bytes:
    """Return the content of a thinned file: of each part its steps and rows, and its series in buckets."""
    arrays: dict[str, Any] = {}
    for number, (part, series) in enumerate(parts):
        arrays[f"@{number}@steps"] = np.array([part.first_step, part.num_steps, size])
        arrays |= _described(part, f"@{number}")
        for name, buckets in series.items():
            arrays[f"{number}:{name}"], arrays[f"@{number}:{name}"] = buckets
    return pack_arrays(arrays)


def _described(part: Part, prefix: str) -> dict[str, Any]:
    described = {f"{prefix}@layers": np.array(part.layers, str)}
    return described | ({f"{prefix}@companion": np.array(part.companion)} if part.companion else {})


def stored_parts(content: bytes) -> list[StoredPart]:
    """Return the parts in a file of steps, from its content.

    Raises:
        Exception: whatever numpy raises at a file that is damaged.
    """
    file = unpack_arrays(content)  # loads an array only when it is accessed
    if "@steps" in file.files:
        names = tuple(name for name in file.files if name[0] != "@")
        first_step, num_steps = file["@steps"].tolist()
        return [StoredPart(first_step, num_steps, *_description(file, ""), names, functools.partial(_array, file, 0))]
    parts: list[StoredPart] = []
    while f"@{len(parts)}@steps" in file.files:
        number = len(parts)
        first_step, num_steps, _ = file[f"@{number}@steps"].tolist()
        names = tuple(name.partition(":")[2] for name in file.files if name.startswith(f"{number}:"))

        array = functools.partial(_array, file, number)
        parts.append(StoredPart(first_step, num_steps, *_description(file, f"@{number}"), names, array))
    if not parts:
        raise ValueError("it holds no steps")
    return parts


def read_series(path: Path, number: int, name: str) -> Array:
    """Read one series of a part in a file, and nothing else of it; the archive has a checksum for each array."""
    with np.load(path) as file:
        return _array(file, number, name)


def _array(file: Any, number: int, name: str) -> Array:
    if "@steps" in file.files:
        whole: Array = file[name]
        return whole
    first_step, num_steps, size = file[f"@{number}@steps"].tolist()
    return opened(Buckets(file[f"{number}:{name}"], file[f"@{number}:{name}"]), first_step, num_steps, size)


def _description(file: Any, prefix: str) -> tuple[tuple[str, ...], str]:
    companion = str(file[f"{prefix}@companion"]) if f"{prefix}@companion" in file.files else ""
    return tuple(map(str, file[f"{prefix}@layers"])), companion


def pack_line(data: Mapping[str, Any]) -> bytes:
    r"""Return a line of JSON with a checksum.

    >>> pack_line({"step": 3})
    b'{"step": 3, "crc32": "08b1f3bf"}\n'
    """
    text = dumps(data)
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def unpack_line(line: bytes) -> dict[str, Any]:
    """Read a line of JSON; one without a checksum is an older one.

    Raises:
        ValueError: it is damaged, or no mapping.
    """
    text = line.decode().rstrip("\n")
    if match := _LINE_CHECKSUM.search(text):
        text = text[: match.start()] + "}" + text[match.end() :]
        if zlib.crc32(text.encode()) != int(match[1], 16):
            raise ValueError("its checksum is not that of its content")
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("it is no mapping")
    return data


def whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a file, without a last one that is still being written; none if there is no file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    unfinished = lines and not lines[-1].endswith(b"\n") and _UNFINISHED.fullmatch(lines[-1])
    return lines[:-1] if unfinished else lines


def remove_half_line(path: Path) -> None:
    """Remove half a line at the end, which a full disk or a kill has left."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def header_fault(path: Path) -> str | None:
    """Say what is wrong with the header of a record; None if it is as it should be.

    Raises:
        ValueError: it is of a newer version.
    """
    try:
        header = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return "is missing or damaged"
    if not isinstance(header, dict) or not isinstance(header.get("version"), int):
        return "is not of a record of stabnorm"
    check_version(header, path)
    return None
