"""What lies in the files of a `FileRecord`: arrays and lines with checksums, and a header."""

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stabnorm.monitor._record_format import check_version, dumps

_BLOCK = re.compile(r"block-(\d{8,})\.npz")
_NPZ_CHECKSUM = re.compile(rb"crc32:([0-9a-f]{8})")  # the comment of the zip archive
_LINE_CHECKSUM = re.compile(r', "crc32": "([0-9a-f]{8})"\}')
_UNFINISHED = re.compile(rb'\{((?!, "crc32": "[0-9a-f]{8}"\})[ -~])*')  # what is damaged looks otherwise
_COMMENT = 2 + len("crc32:01234567")  # with the two bytes that hold the comment's length


def block_number(path: Path) -> int | None:
    """Return the number of a block's file; None for a file of another name, such as a copy.

    >>> block_number(Path("block-00000012.npz")), block_number(Path("block-00000012 (copy).npz"))
    (12, None)
    """
    match = _BLOCK.fullmatch(path.name)
    return int(match[1]) if match else None


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
