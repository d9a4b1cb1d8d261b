"""The Triton backend of `blended`: both norms of a PRepBN with the memory traffic of one; lam stays on the device.

The forward reads its input once for the moments of the batch (`triton.rows`) and once for both norms. The backward
reads input and upstream gradient once for all column sums, those of LayerNorm included, and once for the gradient. The
second pass starts at the last row, see `triton.shared`. At lam = 1 the result is LayerNorm up to rounding, not the same
bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from stabnorm.ops.blended import BlendedSums, LayerNormArgs, TokenMoments, blended_gradient, blended_norm, blended_sums
from stabnorm.ops.rows import BatchMap
from stabnorm.ops.triton.rows import sums_op
from stabnorm.ops.triton.shared import (
    as_bytes,
    blended,
    laid_out,
    rows_of_tile,
    side_by_side,
    tile_from_the_end,
    traceable,
)


@triton.jit
def _norm(
    lam_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, means_ptr, rstds_ptr,
    rows, channels, row_stride, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    r, c, mask = tile_from_the_end(rows, channels, ROWS, CHANNELS)
    mask_c, lam = c < channels, tl.load(lam_ptr)
    x = tl.load(x_ptr + r[:, None] * row_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / channels
    deviation = tl.where(mask, x - mean[:, None], 0.0)
    rest = tl.sum(deviation, 1) / channels  # the rounding error of a mean far from 0
    deviation = tl.where(mask, deviation - rest[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, 1) / channels + eps)
    norm = deviation * rstd[:, None]
    if WEIGHT:
        norm *= tl.load(weight_ptr + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        norm += tl.load(bias_ptr + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    rep = x * tl.load(scale_ptr + c, mask=mask_c, other=0.0)[None, :]
    if SHIFT:
        rep += tl.load(shift_ptr + c, mask=mask_c, other=0.0)[None, :]
    y = blended(lam, norm, rep)
    tl.store(y_ptr + r[:, None] * channels + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(means_ptr + r, mean + rest, mask=r < rows)
    tl.store(rstds_ptr + r, rstd, mask=r < rows)


@triton.jit
def _gradient(
    lam_ptr, dy_ptr, x_ptr, weight_ptr, scale_ptr, mean_ptr, slope_ptr, offset_ptr, valid_ptr, means_ptr, rstds_ptr,
    dx_ptr, rows, channels, dy_stride, x_stride,
    WEIGHT: tl.constexpr, CENTER: tl.constexpr, OFFSET: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    r, c, mask = tile_from_the_end(rows, channels, ROWS, CHANNELS)
    mask_c, inside, lam = c < channels, r < rows, tl.load(lam_ptr)
    dy = tl.load(dy_ptr + r[:, None] * dy_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + r[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstds_ptr + r, mask=inside, other=0.0)[:, None]
    normal = tl.where(mask, (x - tl.load(means_ptr + r, mask=inside, other=0.0)[:, None]) * rstd, 0.0)
    g = dy
    if WEIGHT:
        g = dy * tl.load(weight_ptr + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    plain = tl.sum(g, 1) / channels
    along = tl.sum(g * normal, 1) / channels
    of_norm = (g - plain[:, None] - normal * along[:, None]) * rstd
    if CENTER:
        x -= tl.load(mean_ptr + c, mask=mask_c, other=0.0)[None, :]
    through = x * tl.load(slope_ptr + c, mask=mask_c, other=0.0)[None, :]
    if OFFSET:
        through += tl.load(offset_ptr + c, mask=mask_c, other=0.0)[None, :]
    if MASKED:
        through = tl.where((tl.load(valid_ptr + r, mask=inside, other=0) != 0)[:, None], through, 0.0)
    of_rep = dy * tl.load(scale_ptr + c, mask=mask_c, other=0.0)[None, :] - through
    dx = blended(lam, of_norm, of_rep)
    tl.store(dx_ptr + r[:, None] * channels + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


# --- the ops ---


@triton_op("stabnorm::triton_blended_norm", mutates_args={})
def _norm_op(
    lam: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    length, channels = rows.shape
    y = torch.empty((length, channels), dtype=rows.dtype, device=rows.device)
    means, rstds = (rows.new_empty(length, dtype=torch.float32) for _ in range(2))
    tile = rows_of_tile(channels)
    traceable(_norm)[(triton.cdiv(length, tile.rows),)](
        lam, rows, scale if weight is None else weight, scale if bias is None else bias, scale,
        scale if shift is None else shift, y, means, rstds, length, channels, rows.stride(0), eps,
        WEIGHT=weight is not None, BIAS=bias is not None, SHIFT=shift is not None,
        ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps,
    )  # fmt: skip
    return y, means, rstds


# `same_bits` is False because lam is only known on the device: at lam = 1 torch's LayerNorm cannot be called instead.
@blended_norm.backend("triton", in_graphs=True, same_bits=False)
def norm(
    lam: Tensor, rows: Tensor, own: LayerNormArgs, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `functional.blended_norm`."""
    return _norm_op(lam, laid_out(rows), *own, scale.contiguous(), side_by_side(shift))


@blended_sums.backend("triton", in_graphs=True, same_bits=False)
def sums(
    lam: Tensor, dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None, tokens: TokenMoments
) -> BlendedSums:
    """The four sums of `functional.upstream_sums`, plus the sum of dy n over all rows."""
    sums = sums_op(laid_out(dy), laid_out(rows), side_by_side(mean), valid, *tokens).unbind()
    return BlendedSums(*(sums if valid is not None else (sums[0], sums[1], sums[0], sums[1], sums[2])))


@triton_op("stabnorm::triton_blended_gradient", mutates_args={})
def _gradient_op(
    lam: Tensor,
    dy: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    valid: Tensor | None,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor | None,
    mean: Tensor | None,
    token_mean: Tensor,
    token_rstd: Tensor,
) -> Tensor:
    length, channels = rows.shape
    dx = torch.empty((length, channels), dtype=rows.dtype, device=rows.device)
    tile = rows_of_tile(channels)
    traceable(_gradient)[(triton.cdiv(length, tile.rows),)](
        lam, dy, rows, scale if weight is None else weight, scale, scale if mean is None else mean, slope,
        slope if offset is None else offset, as_bytes(valid, rows), token_mean, token_rstd, dx, length, channels,
        dy.stride(0), rows.stride(0), WEIGHT=weight is not None, CENTER=mean is not None, OFFSET=offset is not None,
        MASKED=valid is not None, ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps,
    )  # fmt: skip
    return dx


@blended_gradient.backend("triton", in_graphs=True, same_bits=False)
def gradient(
    lam: Tensor,
    dy: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    own: LayerNormArgs,
    of: BatchMap,
    tokens: TokenMoments,
    sums: BlendedSums,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.blended.blended_gradient`."""
    dx = _gradient_op(lam, laid_out(dy), laid_out(rows), own.weight, valid, *map(side_by_side, of), *tokens)
    of_weight, of_bias = (torch.where(lam == 0, 0, lam * sum_) for sum_ in (sums.through, sums.plain))
    return dx, of_weight, of_bias
