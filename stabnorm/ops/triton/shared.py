"""What the Triton kernels share: how they are laid over a device, Chan's rule, and the check of what they are handed.

Two shapes of kernel. One over *channels* reduces along the rows: a grid of blocks of channels times splits of the rows,
a few programs for every multiprocessor in all. Split s of S takes the tiles s, s + S, ... of rows, so that all sweep
over the tensor together and what was read last lies at its end: the pass that follows goes backwards and finds it in
the cache. Each program keeps a lane for each row of its tile and merges the lanes at the end, and a second stage merges
the splits: no atomics, so that the sums are the same bits every time. One over *rows* holds whole rows.

There is no autotuning: the tables below are the configuration, and they hold under Triton's interpreter, too.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from stabnorm.ops.tested import interpreted

ROWS = 16  # of a tile of the kernels over channels: a 64-channel row of bfloat16 is 8 threads of 16 bytes
CHANNELS = 64
AHEAD = 4  # tiles whose loads are on their way at once: 4 programs, 128 threads, 64 bytes each are 32 KB in flight
PROGRAMS = 4  # for each multiprocessor
INTERPRETED_PROGRAMS = 4  # enough for several splits; every program costs time there
TILE = 4096  # elements of a tile of the kernels over rows
WIDEST = 65536  # channels that a kernel over rows can hold
WIDEST_WITH_MOMENTS = 4096  # channels of a kernel over rows that also adds up moments: it holds eight sums of each


@functools.cache
def _programs(device: str, index: int | None) -> int:
    if device != "cuda":
        return INTERPRETED_PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def splits_of_rows(device: str, index: int | None) -> int:
    """Programs of a kernel over rows that adds up sums of the channels, and so the splits of its accumulator.

    There is one for each multiprocessor, because more splits would cost a read of their own.
    """
    if device != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


class Columns(NamedTuple):
    """How a reduction over rows is laid over a device."""

    blocks: int  # of channels
    splits: int  # of rows
    channels: int  # of a block
    rows: int  # of a tile
    ahead: int  # tiles that are on their way at once


def columns(channels: int, device: torch.device) -> Columns:
    """The layout for so many channels; it does not depend on the rows, so that their number may vary in a graph."""
    width = min(CHANNELS, max(16, triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, width)
    splits = max(1, _programs(device.type, device.index) // blocks)
    ahead = AHEAD if device.type == "cuda" else 2
    return Columns(blocks, splits, width, ROWS * CHANNELS // width, ahead)


class Rows(NamedTuple):
    """How a pass over whole rows is laid out."""

    channels: int  # of a tile, all there are
    rows: int  # of a tile
    warps: int


def rows_of_tile(channels: int, tile: int = TILE) -> Rows:
    """The layout for so many channels."""
    width = max(16, triton.next_power_of_2(channels))
    rows = max(1, min(64, tile // width))
    return Rows(width, rows, min(32, max(4, width * rows // 512)))


class Map(NamedTuple):
    """How a pass that takes and gives every element is laid out."""

    rows: int
    channels: int


def map_tile(channels: int, tile: int = TILE) -> Map:
    """The tile for so many channels."""
    width = min(256, max(16, triton.next_power_of_2(channels)))
    return Map(tile // width, width)


def map_grid(rows: int, channels: int, tile: Map) -> tuple[int]:
    """One program for each tile."""
    return (triton.cdiv(rows, tile.rows) * triton.cdiv(channels, tile.channels),)


def split_tile(splits: int, width: int = 16) -> dict[str, int]:
    """The tile in which splits are merged: as many as there are, up to 64 at once."""
    return {"SPLITS": min(64, max(2, triton.next_power_of_2(splits))), "CHANNELS": width}


def traceable(kernel: Any) -> Any:
    """Return what launches a kernel and can be traced into a graph.

    Triton's interpreter makes a kernel a Python function, which `wrap_triton` refuses before torch 2.8.
    """
    return kernel if interpreted() else wrap_triton(kernel)


def laid_out(t: Tensor) -> Tensor:
    """``t [R, C]`` with neighbouring channels side by side; the one place where an input may be copied.

    Rows may lie any distance apart: the kernels take the stride.
    """
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def side_by_side(vector: Tensor | None) -> Tensor | None:
    """A vector ``[C]`` with neighbours beside each other."""
    return None if vector is None else vector.contiguous()


def as_bytes(valid: Tensor | None, like: Tensor) -> Tensor:
    """A mask ``[R]`` as bytes, side by side; without one, any tensor, for a kernel that will not look at it."""
    return like if valid is None else valid.contiguous().view(torch.uint8)


@triton.jit
def merged(n_a, shift_a, rest_a, m2_a, n_b, shift_b, rest_b, m2_b):
    """Two counts, means (shift + rest) and sums of squared deviations as one (Chan, Golub, LeVeque 1983).

    The first to have seen anything sets the shift. Also returns the share of b and the difference of the means.
    """
    n = n_a + n_b
    share = n_b / tl.maximum(n, 1.0)
    shift = tl.where(n_a == 0, shift_b, shift_a)
    delta = tl.where(n_b == 0, 0.0, (shift_b - shift) + (rest_b - tl.where(n_a == 0, 0.0, rest_a)))
    rest = tl.where(n_a == 0, rest_b, rest_a + share * delta)
    apart = tl.where(n_a == 0, 0.0, delta)
    m2 = m2_a + m2_b + apart * apart * (n_a * share)
    return n, shift, rest, m2, share, apart


@triton.jit
def lanes_merged(n, shift, rest, m2):
    """What the lanes ``[A, B]`` saw, as one ``[B]``: Chan's rule for all at once, around one of their own shifts.

    Also returns each lane's distance from the mean, for a covariance.
    """
    total = tl.sum(n, 0)
    origin = tl.max(tl.where(n > 0, shift, float("-inf")), 0)
    origin = tl.where(total > 0, origin, 0.0)
    apart = tl.where(n > 0, (shift - origin[None, :]) + rest, 0.0)
    mean = tl.sum(n * apart, 0) / tl.maximum(total, 1.0)
    apart = tl.where(n > 0, apart - mean[None, :], 0.0)
    return total, origin, mean, tl.sum(m2 + n * apart * apart, 0), apart


@triton.jit
def largest(a, b):
    """The larger; NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def least(a, b):
    """The smaller; NaN where either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of(lanes):
    """Over the first axis; NaN where one is."""
    spoilt = tl.max((lanes != lanes).to(tl.int32), 0) > 0
    return tl.where(spoilt, float("nan"), tl.max(lanes, 0))


@triton.jit
def least_of(lanes):
    """Over the first axis; NaN where one is."""
    return -largest_of(-lanes)


@triton.jit
def tile_from_the_end(rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows (64 bits wide), channels and mask of this program's tile; the first program has the last rows."""
    blocks = tl.cdiv(channels, CHANNELS)
    tile = tl.cdiv(rows, ROWS) - 1 - tl.program_id(0) // blocks
    r = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    return r, c, (r < rows)[:, None] & (c < channels)[None, :]


@triton.jit
def blended(lam, norm, rep):
    """``lam norm + (1 - lam) rep``; at 1 and 0 the one or the other, whatever the other holds."""
    return tl.where(lam == 1, norm, tl.where(lam == 0, rep, norm * lam + rep * (1 - lam)))
