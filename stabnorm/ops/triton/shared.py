"""What the Triton kernels share: their layout on a device, Chan's rule, and the preparation of their arguments.

There are two shapes of kernels. A kernel over *channels* reduces along the rows. Its grid is blocks of channels times
splits of the rows, with a few programs for each multiprocessor. Split s of S processes the tiles s, s + S, ... of rows,
so all programs move through the tensor together, and its end is read last. The next pass starts at the end and finds
that data in the cache. Each program has a lane for each row of its tile, and merges the lanes at the end. A second
stage merges the splits. There are no atomics, so the sums are the same bits every time. A kernel over *rows* holds
whole rows.

There is no autotuning. The constants below are the configuration, also under Triton's interpreter.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from stabnorm.ops.tested import interpreted

ROWS = 16  # rows in a tile of the kernels over channels; a row of 64 channels in bfloat16 is 8 threads of 16 bytes
CHANNELS = 64
AHEAD = 4  # tiles that are loaded at the same time: 4 programs, 128 threads, 64 bytes each are 32 KB in flight
PROGRAMS = 4  # programs for each multiprocessor
INTERPRETED_PROGRAMS = 4  # programs under the interpreter: enough for several splits, and each one costs time
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
    """The layout of a reduction over rows."""

    blocks: int  # number of blocks of channels
    splits: int  # number of splits of the rows
    channels: int  # channels in a block
    rows: int  # rows in a tile
    ahead: int  # tiles that are loaded at the same time


def columns(channels: int, device: torch.device) -> Columns:
    """Return the layout for a number of channels. It does not depend on the rows, whose number may vary in a graph."""
    width = min(CHANNELS, max(16, triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, width)
    splits = max(1, _programs(device.type, device.index) // blocks)
    ahead = AHEAD if device.type == "cuda" else 2
    return Columns(blocks, splits, width, ROWS * CHANNELS // width, ahead)


class Rows(NamedTuple):
    """The layout of a pass over whole rows."""

    channels: int  # channels in a tile: all of them
    rows: int  # rows in a tile
    warps: int


def rows_of_tile(channels: int, tile: int = TILE) -> Rows:
    """Return the layout for a number of channels."""
    width = max(16, triton.next_power_of_2(channels))
    rows = max(1, min(64, tile // width))
    return Rows(width, rows, min(32, max(4, width * rows // 512)))


class Map(NamedTuple):
    """The layout of a pass that reads and writes every element."""

    rows: int
    channels: int


def map_tile(channels: int, tile: int = TILE) -> Map:
    """Return the tile for a number of channels."""
    width = min(256, max(16, triton.next_power_of_2(channels)))
    return Map(tile // width, width)


def map_grid(rows: int, channels: int, tile: Map) -> tuple[int]:
    """Return a grid of one program for each tile."""
    return (triton.cdiv(rows, tile.rows) * triton.cdiv(channels, tile.channels),)


def split_tile(splits: int, width: int = 16) -> dict[str, int]:
    """Return the tile for merging splits: all splits at once, up to 64."""
    return {"SPLITS": min(64, max(2, triton.next_power_of_2(splits))), "CHANNELS": width}


def traceable(kernel: Any) -> Any:
    """Return the launcher of a kernel that can be traced into a graph.

    Under Triton's interpreter a kernel is a Python function, which `wrap_triton` does not accept before torch 2.8.
    """
    return kernel if interpreted() else wrap_triton(kernel)


def laid_out(t: Tensor) -> Tensor:
    """Return ``t [R, C]`` with contiguous channels. Only here may an input be copied.

    Rows may have any stride, which the kernels take as an argument.
    """
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def side_by_side(vector: Tensor | None) -> Tensor | None:
    """Return a contiguous vector ``[C]``."""
    return None if vector is None else vector.contiguous()


def as_bytes(valid: Tensor | None, like: Tensor) -> Tensor:
    """Return a contiguous mask ``[R]`` as bytes; without a mask return any tensor, which the kernel will not read."""
    return like if valid is None else valid.contiguous().view(torch.uint8)


@triton.jit
def merged(n_a, shift_a, rest_a, m2_a, n_b, shift_b, rest_b, m2_b):
    """Merge two counts, means (shift + rest) and sums of squared deviations (Chan, Golub, LeVeque 1983).

    The shift is that of a, unless a is empty. Also return the share of b and the difference of the means.
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
    """Merge the lanes ``[A, B]`` to one ``[B]`` by Chan's rule for all at once, around one of their shifts.

    Also return the distance of each lane's mean from the common mean, for a covariance.
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
    """Return the larger of both; NaN if one of them is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def least(a, b):
    """Return the smaller of both; NaN if one of them is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of(lanes):
    """Return the maximum over the first axis; NaN if one value is NaN."""
    has_nan = tl.max((lanes != lanes).to(tl.int32), 0) > 0
    return tl.where(has_nan, float("nan"), tl.max(lanes, 0))


@triton.jit
def least_of(lanes):
    """Return the minimum over the first axis; NaN if one value is NaN."""
    return -largest_of(-lanes)


@triton.jit
def tile_from_the_end(rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return rows (int64), channels and mask of this program's tile; the first program has the last rows."""
    blocks = tl.cdiv(channels, CHANNELS)
    tile = tl.cdiv(rows, ROWS) - 1 - tl.program_id(0) // blocks
    r = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    return r, c, (r < rows)[:, None] & (c < channels)[None, :]


@triton.jit
def blended(lam, norm, rep):
    """Return ``lam norm + (1 - lam) rep``; at lam = 1 and 0 exactly one of them, whatever the other one holds."""
    return tl.where(lam == 1, norm, tl.where(lam == 0, rep, norm * lam + rep * (1 - lam)))
