"""The Triton backend of `rows`: one read for the moments, one for the sums, one read and one write for each map.

The two maps start at the last row, because the reduction before them ended there, and the end of the tensor is still in
the cache. See `stabnorm.ops.triton.shared` for the layout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from stabnorm.functional import BatchMoments
from stabnorm.ops.rows import BatchMap, affine_of_rows, gradient_of_rows, moments_of_rows, sums_of_rows
from stabnorm.ops.triton.shared import (
    Columns,
    as_bytes,
    columns,
    laid_out,
    lanes_merged,
    map_grid,
    map_tile,
    merged,
    side_by_side,
    split_tile,
    tile_from_the_end,
    traceable,
)


@triton.jit
def _moments(
    x_ptr, valid_ptr, out_ptr, rows, channels, row_stride,
    CENTER: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute count, shift, rest and M2, or count and sum of squares, of one split and one block of channels."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    mask_c = c < channels
    n = tl.zeros([ROWS, 1], tl.float32)
    shift = tl.zeros([ROWS, CHANNELS], tl.float32)
    rest = tl.zeros([ROWS, CHANNELS], tl.float32)
    m2 = tl.zeros([ROWS, CHANNELS], tl.float32)
    for tile in range(split, tl.cdiv(rows, ROWS), splits * AHEAD):
        for ahead in tl.static_range(AHEAD):  # independent loads, in flight together
            r = (tile + ahead * splits) * ROWS + tl.arange(0, ROWS)
            keep = r < rows
            if MASKED:
                keep = keep & (tl.load(valid_ptr + r, mask=keep, other=0) != 0)
            at = r.to(tl.int64)[:, None] * row_stride + c[None, :]
            x = tl.load(x_ptr + at, mask=keep[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
            if CENTER:
                first = keep[:, None] & (n == 0)
                shift = tl.where(first, x, shift)
                n += keep.to(tl.float32)[:, None]
                before = tl.where(keep[:, None], (x - shift) - rest, 0.0)
                rest += before * (1.0 / tl.maximum(n, 1.0))
                m2 += before * ((x - shift) - rest)
            else:
                n += keep.to(tl.float32)[:, None]
                m2 += x * x
    out = out_ptr + c + split * channels * (4 if CENTER else 2)
    if CENTER:
        n_all, shift_all, rest_all, m2_all, _ = lanes_merged(n + tl.zeros_like(shift), shift, rest, m2)
        tl.store(out, n_all, mask=mask_c)
        tl.store(out + channels, shift_all, mask=mask_c)
        tl.store(out + 2 * channels, rest_all, mask=mask_c)
        tl.store(out + 3 * channels, m2_all, mask=mask_c)
    else:
        tl.store(out, tl.sum(n + tl.zeros_like(m2), 0), mask=mask_c)
        tl.store(out + channels, tl.sum(m2, 0), mask=mask_c)


@triton.jit
def _merge_moments(
    parts_ptr, count_ptr, mean_ptr, square_ptr, splits, channels,
    CENTER: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge the splits to count, mean and mean square (of the deviation if centred)."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.zeros([SPLITS, CHANNELS], tl.float32)
    shift = tl.zeros([SPLITS, CHANNELS], tl.float32)
    rest = tl.zeros([SPLITS, CHANNELS], tl.float32)
    m2 = tl.zeros([SPLITS, CHANNELS], tl.float32)
    for start in range(0, splits, SPLITS):
        s = start + tl.arange(0, SPLITS)
        mask = (s < splits)[:, None] & (c < channels)[None, :]
        at = parts_ptr + s[:, None] * channels * (4 if CENTER else 2) + c[None, :]
        n_b = tl.load(at, mask=mask, other=0.0)
        if CENTER:
            shift_b = tl.load(at + channels, mask=mask, other=0.0)
            rest_b = tl.load(at + 2 * channels, mask=mask, other=0.0)
            m2_b = tl.load(at + 3 * channels, mask=mask, other=0.0)
            n, shift, rest, m2, _, _ = merged(n, shift, rest, m2, n_b, shift_b, rest_b, m2_b)
        else:
            n += n_b
            m2 += tl.load(at + channels, mask=mask, other=0.0)
    if CENTER:
        n_all, shift_all, rest_all, m2_all, _ = lanes_merged(n, shift, rest, m2)
        tl.store(mean_ptr + c, shift_all + rest_all, mask=c < channels)
    else:
        n_all, m2_all = tl.sum(n, 0), tl.sum(m2, 0)
    tl.store(square_ptr + c, m2_all / tl.maximum(n_all, 1.0), mask=c < channels)
    tl.store(count_ptr + c, n_all, mask=c == 0)


@triton.jit
def _sums(
    dy_ptr, x_ptr, mean_ptr, valid_ptr, tokens_ptr, rstds_ptr, out_ptr, rows, channels, dy_stride, x_stride,
    CENTER: tl.constexpr, MASKED: tl.constexpr, NORMAL: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Sum dy and dy (x - mean) over one split; with MASKED also over its valid rows; with NORMAL also dy n.

    n is the normalised input of LayerNorm, from the mean and 1 / std of each token.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    mask_c = c < channels
    plain = tl.zeros([ROWS, CHANNELS], tl.float32)
    weighted = tl.zeros([ROWS, CHANNELS], tl.float32)
    plain_valid = tl.zeros([ROWS, CHANNELS], tl.float32)
    weighted_valid = tl.zeros([ROWS, CHANNELS], tl.float32)
    through = tl.zeros([ROWS, CHANNELS], tl.float32)
    mean = tl.zeros([CHANNELS], tl.float32)
    if CENTER:
        mean = tl.load(mean_ptr + c, mask=mask_c, other=0.0)
    for tile in range(split, tl.cdiv(rows, ROWS), splits * AHEAD):
        for ahead in tl.static_range(AHEAD):
            r = (tile + ahead * splits) * ROWS + tl.arange(0, ROWS)
            inside = r < rows
            mask = inside[:, None] & mask_c[None, :]
            r64 = r.to(tl.int64)[:, None]
            dy = tl.load(dy_ptr + r64 * dy_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + r64 * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
            product = dy * tl.where(mask, x - mean[None, :], 0.0)
            if MASKED:
                keep = (tl.load(valid_ptr + r, mask=inside, other=0) != 0)[:, None]
                product = tl.where(dy == 0, 0.0, product)
                plain_valid += tl.where(keep, dy, 0.0)
                weighted_valid += tl.where(keep, product, 0.0)
            plain += dy
            weighted += product
            if NORMAL:
                token = tl.load(tokens_ptr + r, mask=inside, other=0.0)[:, None]
                rstd = tl.load(rstds_ptr + r, mask=inside, other=0.0)[:, None]
                product = dy * ((x - token) * rstd)
                if MASKED:
                    product = tl.where(dy == 0, 0.0, product)
                through += product
    out = out_ptr + c + split * channels * ((4 if MASKED else 2) + (1 if NORMAL else 0))
    tl.store(out, tl.sum(plain, 0), mask=mask_c)
    tl.store(out + channels, tl.sum(weighted, 0), mask=mask_c)
    if MASKED:
        tl.store(out + 2 * channels, tl.sum(plain_valid, 0), mask=mask_c)
        tl.store(out + 3 * channels, tl.sum(weighted_valid, 0), mask=mask_c)
    if NORMAL:
        tl.store(out + (4 if MASKED else 2) * channels, tl.sum(through, 0), mask=mask_c)


@triton.jit
def add_splits(parts_ptr, out_ptr, splits, size, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """Sum ``parts [S, size]`` over the splits, in a fixed order."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SPLITS, SIZE], tl.float32)
    for start in range(0, splits, SPLITS):
        s = start + tl.arange(0, SPLITS)
        mask = (s < splits)[:, None] & (at < size)[None, :]
        total += tl.load(parts_ptr + s[:, None] * size + at[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + at, tl.sum(total, 0), mask=at < size)


@triton.jit
def _affine(
    x_ptr, scale_ptr, shift_ptr, y_ptr, rows, channels, row_stride,
    SHIFTED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    r, c, mask = tile_from_the_end(rows, channels, ROWS, CHANNELS)
    mask_c = c < channels
    scale = tl.load(scale_ptr + c, mask=mask_c, other=0.0)
    x = tl.load(x_ptr + r[:, None] * row_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = x * scale[None, :]
    if SHIFTED:
        y += tl.load(shift_ptr + c, mask=mask_c, other=0.0)[None, :]
    tl.store(y_ptr + r[:, None] * channels + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(
    dy_ptr, x_ptr, mean_ptr, valid_ptr, scale_ptr, slope_ptr, offset_ptr, dx_ptr, rows, channels, dy_stride, x_stride,
    CENTER: tl.constexpr, OFFSET: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    r, c, mask = tile_from_the_end(rows, channels, ROWS, CHANNELS)
    mask_c = c < channels
    dy = tl.load(dy_ptr + r[:, None] * dy_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + r[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if CENTER:
        x -= tl.load(mean_ptr + c, mask=mask_c, other=0.0)[None, :]
    through = x * tl.load(slope_ptr + c, mask=mask_c, other=0.0)[None, :]
    if OFFSET:
        through += tl.load(offset_ptr + c, mask=mask_c, other=0.0)[None, :]
    if MASKED:
        keep = tl.load(valid_ptr + r, mask=r < rows, other=0) != 0
        through = tl.where(keep[:, None], through, 0.0)
    dx = dy * tl.load(scale_ptr + c, mask=mask_c, other=0.0)[None, :] - through
    tl.store(dx_ptr + r[:, None] * channels + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


# --- the ops ---


def _layout(where: Columns) -> dict[str, int]:
    return {"ROWS": where.rows, "CHANNELS": where.channels, "AHEAD": where.ahead}


@triton_op("stabnorm::triton_moments_of_rows", mutates_args={})
def _moments_op(rows: Tensor, valid: Tensor | None, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    length, channels = rows.shape
    where = columns(channels, rows.device)
    parts = rows.new_empty((where.splits, 4 if center else 2, channels), dtype=torch.float32)
    count, mean, square = (rows.new_empty(size, dtype=torch.float32) for size in ((), channels, channels))
    traceable(_moments)[(where.blocks, where.splits)](
        rows, as_bytes(valid, rows), parts, length, channels, rows.stride(0),
        CENTER=center, MASKED=valid is not None, **_layout(where),
    )  # fmt: skip
    tile = split_tile(where.splits)
    traceable(_merge_moments)[(triton.cdiv(channels, tile["CHANNELS"]),)](
        parts, count, mean, square, where.splits, channels, CENTER=center, **tile
    )
    return count, mean, square


@moments_of_rows.backend("triton", in_graphs=True)
def moments(rows: Tensor, valid: Tensor | None, *, center: bool) -> BatchMoments:
    """See `functional.batch_moments`."""
    count, mean, square = _moments_op(laid_out(rows), valid, center)
    return BatchMoments(count, mean if center else None, square)


@triton_op("stabnorm::triton_sums_of_rows", mutates_args={})
def sums_op(
    dy: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    valid: Tensor | None,
    token_mean: Tensor | None = None,
    token_rstd: Tensor | None = None,
) -> Tensor:
    """Return sums ``[2, C]``, or ``[4, C]`` with a mask; one more row with token statistics, see `_sums`."""
    length, channels = rows.shape
    where, masked = columns(channels, rows.device), valid is not None
    normal = token_mean is not None and token_rstd is not None
    parts = rows.new_empty((where.splits, (4 if masked else 2) + normal, channels), dtype=torch.float32)
    traceable(_sums)[(where.blocks, where.splits)](
        dy, rows, rows if mean is None else mean, as_bytes(valid, rows), token_mean if normal else rows,
        token_rstd if normal else rows, parts, length, channels, dy.stride(0), rows.stride(0),
        CENTER=mean is not None, MASKED=masked, NORMAL=normal, **_layout(where),
    )  # fmt: skip
    out = rows.new_empty(parts.shape[1:], dtype=torch.float32)
    tile = split_tile(where.splits)
    traceable(add_splits)[(triton.cdiv(out.numel(), tile["CHANNELS"]),)](
        parts, out, where.splits, out.numel(), SPLITS=tile["SPLITS"], SIZE=tile["CHANNELS"]
    )
    return out


@sums_of_rows.backend("triton", in_graphs=True)
def sums(dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `functional.upstream_sums`."""
    sums = sums_op(laid_out(dy), laid_out(rows), side_by_side(mean), valid).unbind()
    return (*sums, *sums) if valid is None else sums


@triton_op("stabnorm::triton_affine_of_rows", mutates_args={})
def _affine_op(rows: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    length, channels = rows.shape
    y = torch.empty((length, channels), dtype=rows.dtype, device=rows.device)
    tile = map_tile(channels)
    traceable(_affine)[map_grid(length, channels, tile)](
        rows, scale, scale if shift is None else shift, y, length, channels, rows.stride(0),
        SHIFTED=shift is not None, ROWS=tile.rows, CHANNELS=tile.channels,
    )  # fmt: skip
    return y


@affine_of_rows.backend("triton", in_graphs=True)
def affine(rows: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Return ``rows scale + shift``."""
    return _affine_op(laid_out(rows), scale.contiguous(), side_by_side(shift))


@triton_op("stabnorm::triton_gradient_of_rows", mutates_args={})
def _gradient_op(
    dy: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    length, channels = rows.shape
    dx = torch.empty((length, channels), dtype=rows.dtype, device=rows.device)
    tile = map_tile(channels)
    traceable(_gradient)[map_grid(length, channels, tile)](
        dy, rows, slope if mean is None else mean, as_bytes(valid, rows), scale, slope,
        slope if offset is None else offset, dx, length, channels, dy.stride(0), rows.stride(0),
        CENTER=mean is not None, OFFSET=offset is not None, MASKED=valid is not None,
        ROWS=tile.rows, CHANNELS=tile.channels,
    )  # fmt: skip
    return dx


@gradient_of_rows.backend("triton", in_graphs=True)
def gradient(dy: Tensor, rows: Tensor, valid: Tensor | None, of: BatchMap) -> Tensor:
    """See `functional.input_gradient`."""
    return _gradient_op(laid_out(dy), laid_out(rows), valid, *map(side_by_side, of))
