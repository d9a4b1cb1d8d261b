"""The Triton backend of `one_pass`: a map and the column sums of its input, in one read and one write.

The vectors of the maps are a guess. Whether the guess was right is known on the device after the sums are merged. A
second pass reads this flag first, and returns at once if the guess was right; else it computes the map again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from stabnorm.functional import BatchMoments
from stabnorm.ops.one_pass import affine_with_square, gradient_with_sums, redo_affine_, redo_gradient_
from stabnorm.ops.triton.rows import add_splits
from stabnorm.ops.triton.shared import (
    as_bytes,
    columns,
    laid_out,
    map_grid,
    map_tile,
    side_by_side,
    split_tile,
    tile_from_the_end,
    traceable,
)


@triton.jit
def _affine_square(
    x_ptr, valid_ptr, scale_ptr, shift_ptr, y_ptr, out_ptr, rows, channels, x_stride,
    SHIFT: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute y = x scale + shift for all rows, and count and sum of x^2 over the valid rows of one split."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    mask_c = c < channels
    scale = tl.load(scale_ptr + c, mask=mask_c, other=0.0)
    shift = tl.zeros([CHANNELS], tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + c, mask=mask_c, other=0.0).to(tl.float32)
    n = tl.zeros([ROWS, 1], tl.float32)
    square = tl.zeros([ROWS, CHANNELS], tl.float32)
    for tile in range(split, tl.cdiv(rows, ROWS), splits * AHEAD):
        for ahead in tl.static_range(AHEAD):
            r = (tile + ahead * splits) * ROWS + tl.arange(0, ROWS)
            inside = r < rows
            mask = inside[:, None] & mask_c[None, :]
            r64 = r.to(tl.int64)[:, None]
            x = tl.load(x_ptr + r64 * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
            y = x * scale[None, :] + shift[None, :]
            tl.store(y_ptr + r64 * channels + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
            keep = inside
            if MASKED:
                keep = inside & (tl.load(valid_ptr + r, mask=inside, other=0) != 0)
                x = tl.where(keep[:, None], x, 0.0)
            n += keep.to(tl.float32)[:, None]
            square += x * x
    out = out_ptr + c + split * channels * 2
    tl.store(out, tl.sum(n + tl.zeros_like(square), 0), mask=mask_c)
    tl.store(out + channels, tl.sum(square, 0), mask=mask_c)


@triton.jit
def _gradient_sums(
    dy_ptr, x_ptr, valid_ptr, scale_ptr, slope_ptr, dx_ptr, out_ptr, rows, channels, dy_stride, x_stride,
    MASKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute dx = dy scale - [valid] slope x, and sums of dy and dy x over one split; MASKED: also over valid rows."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    mask_c = c < channels
    scale = tl.load(scale_ptr + c, mask=mask_c, other=0.0)
    slope = tl.load(slope_ptr + c, mask=mask_c, other=0.0)
    plain = tl.zeros([ROWS, CHANNELS], tl.float32)
    weighted = tl.zeros([ROWS, CHANNELS], tl.float32)
    plain_valid = tl.zeros([ROWS, CHANNELS], tl.float32)
    weighted_valid = tl.zeros([ROWS, CHANNELS], tl.float32)
    for tile in range(split, tl.cdiv(rows, ROWS), splits * AHEAD):
        for ahead in tl.static_range(AHEAD):
            r = (tile + ahead * splits) * ROWS + tl.arange(0, ROWS)
            inside = r < rows
            mask = inside[:, None] & mask_c[None, :]
            r64 = r.to(tl.int64)[:, None]
            dy = tl.load(dy_ptr + r64 * dy_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + r64 * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
            through = x * slope[None, :]
            product = dy * x
            if MASKED:
                keep = (tl.load(valid_ptr + r, mask=inside, other=0) != 0)[:, None]
                through = tl.where(keep, through, 0.0)
                product = tl.where(dy == 0, 0.0, product)
                plain_valid += tl.where(keep, dy, 0.0)
                weighted_valid += tl.where(keep, product, 0.0)
            plain += dy
            weighted += product
            dx = dy * scale[None, :] - through
            tl.store(dx_ptr + r64 * channels + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    out = out_ptr + c + split * channels * (4 if MASKED else 2)
    tl.store(out, tl.sum(plain, 0), mask=mask_c)
    tl.store(out + channels, tl.sum(weighted, 0), mask=mask_c)
    if MASKED:
        tl.store(out + 2 * channels, tl.sum(plain_valid, 0), mask=mask_c)
        tl.store(out + 3 * channels, tl.sum(weighted_valid, 0), mask=mask_c)


@triton.jit
def _redo_affine(
    right_ptr, x_ptr, scale_ptr, shift_ptr, y_ptr, rows, channels, x_stride,
    SHIFT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    if tl.load(right_ptr) == 0:
        r, c, mask = tile_from_the_end(rows, channels, ROWS, CHANNELS)
        mask_c = c < channels
        x = tl.load(x_ptr + r[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        y = x * tl.load(scale_ptr + c, mask=mask_c, other=0.0)[None, :]
        if SHIFT:
            y += tl.load(shift_ptr + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + r[:, None] * channels + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _redo_gradient(
    right_ptr, dy_ptr, x_ptr, valid_ptr, scale_ptr, slope_ptr, dx_ptr, rows, channels, dy_stride, x_stride,
    MASKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    if tl.load(right_ptr) == 0:
        r, c, mask = tile_from_the_end(rows, channels, ROWS, CHANNELS)
        mask_c = c < channels
        dy = tl.load(dy_ptr + r[:, None] * dy_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + r[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        through = x * tl.load(slope_ptr + c, mask=mask_c, other=0.0)[None, :]
        if MASKED:
            keep = tl.load(valid_ptr + r, mask=r < rows, other=0) != 0
            through = tl.where(keep[:, None], through, 0.0)
        dx = dy * tl.load(scale_ptr + c, mask=mask_c, other=0.0)[None, :] - through
        tl.store(dx_ptr + r[:, None] * channels + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _added(parts: Tensor) -> Tensor:
    out = parts.new_empty(parts.shape[1:])
    tile = split_tile(parts.shape[0])
    traceable(add_splits)[(triton.cdiv(out.numel(), tile["CHANNELS"]),)](
        parts, out, parts.shape[0], out.numel(), SPLITS=tile["SPLITS"], SIZE=tile["CHANNELS"]
    )
    return out


@triton_op("stabnorm::triton_affine_with_square", mutates_args={})
def _affine_op(rows: Tensor, valid: Tensor | None, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    length, channels = rows.shape
    where = columns(channels, rows.device)
    y = torch.empty((length, channels), dtype=rows.dtype, device=rows.device)
    parts = rows.new_empty((where.splits, 2, channels), dtype=torch.float32)
    traceable(_affine_square)[(where.blocks, where.splits)](
        rows, as_bytes(valid, rows), scale, scale if shift is None else shift, y, parts, length, channels,
        rows.stride(0), SHIFT=shift is not None, MASKED=valid is not None,
        ROWS=where.rows, CHANNELS=where.channels, AHEAD=where.ahead,
    )  # fmt: skip
    return y, _added(parts)


@affine_with_square.backend("triton", in_graphs=True)
def affine(
    rows: Tensor, valid: Tensor | None, scale: Tensor, shift: Tensor | None, guess: bool = True
) -> tuple[Tensor, BatchMoments]:
    """See `ops.one_pass.affine_with_square`."""
    if not guess:
        return affine_with_square.formula(rows, valid, scale, shift, False)
    y, sums = _affine_op(laid_out(rows), valid, scale.contiguous(), side_by_side(shift))
    count, square = sums.unbind()
    return y, BatchMoments(count.select(0, 0), None, square / count.clamp(min=1))


@triton_op("stabnorm::triton_redo_affine_", mutates_args={"y"})
def _redo_affine_op(y: Tensor, right: Tensor, rows: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    length, channels = rows.shape
    tile = map_tile(channels)
    traceable(_redo_affine)[map_grid(length, channels, tile)](
        right.view(torch.uint8), rows, scale, scale if shift is None else shift, y, length, channels, rows.stride(0),
        SHIFT=shift is not None, ROWS=tile.rows, CHANNELS=tile.channels,
    )  # fmt: skip


@redo_affine_.backend("triton", in_graphs=True)
def redo_map_(y: Tensor, right: Tensor, rows: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    """Write ``rows scale + shift`` into y unless ``right``, a bool scalar on the device."""
    _redo_affine_op(y, right, laid_out(rows), scale.contiguous(), side_by_side(shift))


@triton_op("stabnorm::triton_gradient_with_sums", mutates_args={})
def _gradient_op(dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    length, channels = rows.shape
    where, masked = columns(channels, rows.device), valid is not None
    dx = torch.empty((length, channels), dtype=rows.dtype, device=rows.device)
    parts = rows.new_empty((where.splits, 4 if masked else 2, channels), dtype=torch.float32)
    traceable(_gradient_sums)[(where.blocks, where.splits)](
        dy, rows, as_bytes(valid, rows), scale, slope, dx, parts, length, channels, dy.stride(0), rows.stride(0),
        MASKED=masked, ROWS=where.rows, CHANNELS=where.channels, AHEAD=max(1, where.ahead // 2),
    )  # fmt: skip
    return dx, _added(parts)


@gradient_with_sums.backend("triton", in_graphs=True)
def gradient(
    dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor, guess: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See `ops.one_pass.gradient_with_sums`."""
    if not guess:
        return gradient_with_sums.formula(dy, rows, valid, scale, slope, False)
    dx, sums = _gradient_op(laid_out(dy), laid_out(rows), valid, scale.contiguous(), slope.contiguous())
    parts = sums.unbind()
    return dx, parts if valid is not None else (*parts, *parts)


@triton_op("stabnorm::triton_redo_gradient_", mutates_args={"dx"})
def _redo_gradient_op(
    dx: Tensor, right: Tensor, dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor
) -> None:
    length, channels = rows.shape
    tile = map_tile(channels)
    traceable(_redo_gradient)[map_grid(length, channels, tile)](
        right.view(torch.uint8), dy, rows, as_bytes(valid, rows), scale, slope, dx, length, channels, dy.stride(0),
        rows.stride(0), MASKED=valid is not None, ROWS=tile.rows, CHANNELS=tile.channels,
    )  # fmt: skip


@redo_gradient_.backend("triton", in_graphs=True)
def redo_input_gradient_(
    dx: Tensor, right: Tensor, dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor
) -> None:
    """Write the gradient into dx unless ``right``, a bool scalar on the device."""
    _redo_gradient_op(dx, right, laid_out(dy), laid_out(rows), valid, scale.contiguous(), slope.contiguous())
