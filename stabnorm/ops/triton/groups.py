"""The Triton backend of PowerNorm's GroupScaling; each group of a token's channels is a short row of its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from stabnorm.ops.groups import gradient_of_groups, scaled_groups
from stabnorm.ops.triton.shared import rows_of_tile, tile_from_the_end, traceable


@triton.jit
def _scale(x_ptr, y_ptr, r_ptr, rows, channels, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row, c, mask = tile_from_the_end(rows, channels, ROWS, CHANNELS)
    at = row[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / channels + eps)
    tl.store(y_ptr + at, (x * r[:, None]).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(r_ptr + row, r, mask=row < rows)


@triton.jit
def _gradient(
    dy_ptr, y_ptr, r_ptr, dx_ptr, rows, channels, MASKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    row, c, mask = tile_from_the_end(rows, channels, ROWS, CHANNELS)
    at = row[:, None] * channels + c[None, :]
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + row, mask=row < rows, other=0.0)[:, None]
    dx = (dy - y * (tl.sum(dy * y, 1) / channels)[:, None]) * r
    if MASKED:  # padding may hold NaN: where dy is 0, dx is 0
        silent = tl.sum((dy != 0).to(tl.int32), 1) == 0
        dx = tl.where(silent[:, None], 0.0, dx)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton_op("stabnorm::triton_scale_groups", mutates_args={})
def _scale_op(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    length, width = rows.shape[0] * groups, rows.shape[1] // groups
    y = torch.empty_like(rows)
    r = rows.new_empty((rows.shape[0], groups), dtype=torch.float32)
    tile = rows_of_tile(width)
    traceable(_scale)[(triton.cdiv(length, tile.rows),)](
        rows, y, r, length, width, eps, ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps
    )
    return y, r


@scaled_groups.backend("triton", in_graphs=True)
def scaled(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.groups.scaled_groups`."""
    return _scale_op(rows.contiguous(), groups, eps)


@triton_op("stabnorm::triton_gradient_of_groups", mutates_args={})
def _gradient_op(dy: Tensor, y: Tensor, r: Tensor, masked: bool) -> Tensor:
    length, width = r.numel(), y.shape[1] // r.shape[1]
    dx = torch.empty_like(dy)
    tile = rows_of_tile(width)
    traceable(_gradient)[(triton.cdiv(length, tile.rows),)](
        dy, y, r, dx, length, width, MASKED=masked, ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps
    )
    return dx


@gradient_of_groups.backend("triton", in_graphs=True)
def gradient(dy: Tensor, y: Tensor, r: Tensor, masked: bool) -> Tensor:
    """See `ops.groups.gradient_of_groups`."""
    return _gradient_op(dy.contiguous(), y.contiguous(), r.contiguous(), masked)
