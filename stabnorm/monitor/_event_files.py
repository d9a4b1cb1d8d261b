"""The framing of TensorBoard's event files: length, checksum of the length, event, checksum of the event.

The checksum is a CRC-32C, which neither Python nor numpy has. TensorBoard computes it byte by byte in Python, 12 s for
100 MB; here numpy does it for many bytes at once. It uses that the CRC of a text, begun with 0, is linear: the CRC of
two texts in a row is the CRC of the second one, plus (exclusive or) that of the first one moved on by as many bytes.
"""

import struct
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

_POLYNOMIAL = 0x82F63B78
_SPAN = 32  # bytes whose checksums are looked up in tables
_SHORT = 2000  # bytes; below, a loop in Python is faster
_TOGETHER = 1 << 21  # bytes whose checksums are computed at once
_SCANNED = 1 << 20  # bytes that are searched at once

Words = npt.NDArray[np.uint32]


def _bytes_table() -> Words:
    """Return the CRC of each single byte."""
    table: Words = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ (table & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return table


_OF_BYTE = _bytes_table()
_LOOP = _OF_BYTE.tolist()


def _spans_table() -> Words:
    """Return what a byte at each place of a span adds to the span's CRC, ``[place, byte]``."""
    rows = [_OF_BYTE]
    for _ in range(_SPAN - 1):
        rows.append(_OF_BYTE[rows[-1] & 0xFF] ^ (rows[-1] >> 8))  # one byte further from the end
    return np.stack(rows[::-1])


_OF_SPAN = _spans_table()


def _move(tables: Words, crcs: Words) -> Words:
    """Move CRCs on; `tables` has the result for each value of each of the four bytes of a CRC."""
    moved: Words = tables[0][crcs & 0xFF]
    for i in range(1, 4):
        moved = moved ^ tables[i][(crcs >> (8 * i)) & 0xFF]
    return moved


_MOVE_A_SPAN = _OF_SPAN[:4]  # a CRC followed by a span of zeros is like a span that begins with the CRC's bytes


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """Return the CRC-32C (Castagnoli) of bytes.

    >>> hex(crc32c(b"123456789")), hex(crc32c(bytes(1000)))
    ('0xe3069283', '0xd84dda57')
    """
    if len(data) < _SHORT:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = _LOOP[(crc ^ byte) & 0xFF] ^ (crc >> 8)
        return crc ^ 0xFFFFFFFF
    return crc32cs([data])[0]


def crc32cs(texts: Sequence[bytes | bytearray | memoryview]) -> list[int]:
    """Return the CRC-32C of several long texts at once, which is faster than one after the other.

    >>> crc32cs([bytes(5000), b"x" * 3000]) == [crc32c(bytes(5000)), crc32c(b"x" * 3000)]
    True
    """
    # Zeros in front change nothing, so that the bytes fill whole spans, the same number for all texts.
    spans = np.zeros((len(texts), -(-max(map(len, texts)) // _SPAN), _SPAN), np.uint8)
    for row, text in zip(spans.reshape(len(texts), -1), texts, strict=True):
        row[-len(text) :] = np.frombuffer(text, np.uint8)
        row[len(row) - len(text) :][:4] ^= 0xFF  # the CRC begins with ones
    crcs = np.zeros(spans.shape[:2], np.uint32)
    for place in range(_SPAN):
        crcs ^= _OF_SPAN[place][spans[:, :, place]]
    move = _MOVE_A_SPAN
    while crcs.shape[1] > 1:
        if crcs.shape[1] % 2:
            crcs = np.concatenate([np.zeros((len(texts), 1), np.uint32), crcs], axis=1)
        crcs = _move(move, crcs[:, 0::2]) ^ crcs[:, 1::2]
        move = _move(move, move)  # twice as far
    return [int(crc) ^ 0xFFFFFFFF for crc in crcs[:, 0]]


def _masked(crc: int) -> int:
    """Return the form in which an event file holds a CRC."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def framed(event: bytes) -> bytes:
    """Return an event with its length and its checksums, as it lies in a file."""
    length = struct.pack("<Q", len(event))
    return length + struct.pack("<I", _masked(crc32c(length))) + event + struct.pack("<I", _masked(crc32c(event)))


def events_of(content: bytes) -> Iterator[bytes | None]:
    """Yield the events of a file, and None for each damaged piece, which is skipped.

    An event that is cut short is the end of the file: it is still being written, or its writer was killed.

    >>> whole = framed(b"one") + framed(b"two") + framed(b"three")
    >>> list(events_of(whole[:-1]))
    [b'one', b'two']
    >>> list(events_of(whole.replace(b"one", b"0ne")))
    [None, b'two', b'three']
    >>> list(events_of(b"no event file at all" + whole))
    [None, b'one', b'two', b'three']
    """
    return (event for _, _, event in placed_events(content))


def placed_events(content: bytes | memoryview) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield as `events_of`, with the place of each event: its first byte, and where the next length begins.

    >>> [(start, end) for start, end, _ in placed_events(framed(b"one") + framed(b"three"))]
    [(12, 19), (31, 40)]
    """
    view, start = memoryview(content), 0
    frames: list[tuple[int, int]] = []  # first byte and end of events whose checksums wait to be checked together
    longest = 0
    while start + 12 <= len(view):
        length, checksum = struct.unpack("<QI", view[start : start + 12])
        if checksum != _masked(crc32c(view[start : start + 8])):
            yield from _checked(view, frames)
            frames, longest = [], 0
            damaged, start = start, _next_event(view, start + 1)
            yield damaged, start, None
            continue
        end = start + 12 + length
        if end + 4 > len(view):
            break
        frames.append((start + 12, end))
        longest = max(longest, length)
        if longest * len(frames) > _TOGETHER:
            yield from _checked(view, frames)
            frames, longest = [], 0
        start = end + 4
    yield from _checked(view, frames)


def _checked(view: memoryview, frames: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield the events of some frames, None where the checksum is another one."""
    long = [frame for frame in frames if frame[1] - frame[0] >= _SHORT]
    known = dict(zip(long, crc32cs([view[begin:end] for begin, end in long]) if long else (), strict=True))
    for begin, end in frames:
        crc = known[begin, end] if (begin, end) in known else crc32c(view[begin:end])
        (checksum,) = struct.unpack("<I", view[end : end + 4])
        yield begin, end + 4, bytes(view[begin:end]) if checksum == _masked(crc) else None


def _next_event(view: memoryview, start: int) -> int:
    """Return where the next length with the right checksum is; the end of the file if there is none."""
    for first in range(start, len(view) - 11, _SCANNED):
        piece = np.frombuffer(view[first : first + _SCANNED + 11], np.uint8)
        places = len(piece) - 11
        crcs = np.full(places, 0xFFFFFFFF, np.uint32)
        for i in range(8):
            crcs = _OF_BYTE[(crcs ^ piece[i : i + places]) & 0xFF] ^ (crcs >> 8)
        crcs = ~crcs
        masked = ((crcs >> 15) | (crcs << 17)) + np.uint32(0xA282EAD8)
        stored = sum((piece[8 + i : 8 + i + places].astype(np.uint32) << (8 * i) for i in range(4)), np.uint32(0))
        if len(offsets := np.flatnonzero(masked == stored)):
            return first + int(offsets[0])
    return len(view)
