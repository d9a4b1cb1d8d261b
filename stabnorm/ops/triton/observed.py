"""The Triton backend of `observed`: LayerNorm or RMSNorm, and the moments of its input for a monitor, in one read.

Each program holds whole rows, processes its share of the tiles, and keeps the moments of the columns in registers. At
the end it adds them to its own split of the layer's accumulator, see `stabnorm.ops.triton.accumulators`. So there is no
more memory traffic than for the norm alone. The backward also sums dy n and dy over the columns. These are the
gradients of gain and bias, from which the gradient statistics are computed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from stabnorm.functional import RawMoments
from stabnorm.ops.observed import NormKind, Spec, norm_gradient, norm_with_moments
from stabnorm.ops.triton.accumulators import add_moments, add_normalized, add_tokens
from stabnorm.ops.triton.rows import add_splits
from stabnorm.ops.triton.shared import (
    as_bytes,
    laid_out,
    largest,
    largest_of,
    least,
    least_of,
    merged,
    rows_of_tile,
    side_by_side,
    split_tile,
    splits_of_rows,
    traceable,
)


@triton.jit
def _observed(
    x_ptr, weight_ptr, bias_ptr, y_ptr, means_ptr, rstds_ptr, valid_ptr,
    seen_ptr, counts_ptr, channel_ptr, token_ptr,
    rows, channels, row_stride, split_stride, line_stride, token_stride, eps,
    RMS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    TOKENS: tl.constexpr, NORMALIZED: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the norm of one split of the rows; with ADD also add its moments to the split's accumulator."""
    c = tl.arange(0, CHANNELS)
    mask_c = c < channels
    split, splits = tl.program_id(0), tl.num_programs(0)
    n = tl.zeros([CHANNELS], tl.float32)
    shift, rest, m2 = tl.zeros_like(n), tl.zeros_like(n), tl.zeros_like(n)
    shift_n, mean_n, m2_n, m2_xn = tl.zeros_like(n), tl.zeros_like(n), tl.zeros_like(n), tl.zeros_like(n)
    most = tl.full([CHANNELS], float("-inf"), tl.float32)
    fewest = tl.full([CHANNELS], float("inf"), tl.float32)
    counted = tl.zeros([ROWS], tl.float32)  # tokens so far, with a lane for each row of the tile
    std_mean, mean_mean, below = tl.zeros_like(counted), tl.zeros_like(counted), tl.zeros_like(counted)
    std_least = tl.full([ROWS], float("inf"), tl.float32)
    mean_least = tl.full([ROWS], float("inf"), tl.float32)
    std_most = tl.full([ROWS], float("-inf"), tl.float32)
    mean_most = tl.full([ROWS], float("-inf"), tl.float32)
    if WEIGHT:
        gain = tl.load(weight_ptr + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        offset = tl.load(bias_ptr + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    for tile in tl.range(split, tl.cdiv(rows, ROWS), splits, num_stages=STAGES):
        r = tile * ROWS + tl.arange(0, ROWS)
        inside = r < rows
        r64 = r.to(tl.int64)
        mask = inside[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + r64[:, None] * row_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        high = tl.sum(x, 1) / channels
        deviation = tl.where(mask, x - high[:, None], 0.0)
        low = tl.sum(deviation, 1) / channels  # the rounding error of a mean far from 0
        deviation = tl.where(mask, deviation - low[:, None], 0.0)
        var = tl.sum(deviation * deviation, 1) / channels
        mean = high + low
        divided_by = var
        if RMS:
            divided_by = var + mean * mean
        rstd = tl.rsqrt(divided_by + eps)
        if RMS:
            normal = x * rstd[:, None]
        else:
            normal = deviation * rstd[:, None]
        y = normal
        if WEIGHT:
            y *= gain
        if BIAS:
            y += offset
        tl.store(y_ptr + r64[:, None] * channels + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(means_ptr + r64, mean, mask=inside)
        tl.store(rstds_ptr + r64, rstd, mask=inside)
        if ADD:
            keep = inside
            if MASKED:
                keep = keep & (tl.load(valid_ptr + r64, mask=inside, other=0) != 0)
            of_tile = tl.sum(keep.to(tl.float32), 0)
            size = tl.maximum(of_tile, 1.0)
            kept = keep[:, None]
            most = largest(most, largest_of(tl.where(kept, x, float("-inf"))))
            fewest = least(fewest, least_of(tl.where(kept, x, float("inf"))))
            origin = tl.sum(tl.where(kept, x, 0.0), 0) / size
            apart = tl.where(kept, x - origin[None, :], 0.0)
            off = tl.sum(apart, 0) / size
            apart = tl.where(kept, apart - off[None, :], 0.0)
            n_new, shift, rest, m2, share, delta = merged(
                n, shift, rest, m2, of_tile + tl.zeros_like(n), origin, off, tl.sum(apart * apart, 0)
            )
            if NORMALIZED:
                origin_n = tl.sum(tl.where(kept, normal, 0.0), 0) / size
                apart_n = tl.where(kept, normal - origin_n[None, :], 0.0)
                _, shift_n, mean_n, m2_n, _, delta_n = merged(
                    n, shift_n, mean_n, m2_n, of_tile + tl.zeros_like(n), origin_n, tl.zeros_like(n),
                    tl.sum(apart_n * apart_n, 0),
                )  # fmt: skip
                m2_xn += tl.sum(apart * apart_n, 0) + delta * delta_n * (n * share)
            n = n_new
            if TOKENS:
                of_token = tl.where(keep, 1.0, 0.0)
                here = of_token > 0  # not `keep`: changing the layout of such a mask would use local memory
                counted += of_token
                weight = of_token / tl.maximum(counted, 1.0)
                std = tl.sqrt(var)
                std_mean += tl.where(here, std - std_mean, 0.0) * weight
                mean_mean += tl.where(here, mean - mean_mean, 0.0) * weight
                below += tl.where(divided_by < 10 * eps, of_token, 0.0)
                std_least = least(std_least, tl.where(here, std, float("inf")))
                mean_least = least(mean_least, tl.where(here, mean, float("inf")))
                std_most = largest(std_most, tl.where(here, std, float("-inf")))
                mean_most = largest(mean_most, tl.where(here, mean, float("-inf")))
    if ADD:
        n_a = tl.load(seen_ptr + split).to(tl.float32)
        accumulator = channel_ptr + split.to(tl.int64) * split_stride + c
        n_ab, share, delta = add_moments(accumulator, line_stride, mask_c, n_a, n, shift, rest, m2, most, fewest)
        if NORMALIZED:
            add_normalized(accumulator, line_stride, mask_c, n_a, n, n_ab, share, delta, shift_n, mean_n, m2_n, m2_xn)
        count = tl.max(n, 0)
        tl.store(counts_ptr + split, count.to(tl.int64))
        if TOKENS and count > 0:
            add_tokens(
                token_ptr + split * token_stride, n_a, count, tl.sum(counted * std_mean, 0) / count,
                tl.sum(counted * mean_mean, 0) / count, tl.sum(below, 0) / count, least_of(std_least),
                least_of(mean_least), largest_of(std_most), largest_of(mean_most),
            )  # fmt: skip


@triton.jit
def _norm_gradient(
    dy_ptr, x_ptr, weight_ptr, means_ptr, rstds_ptr, dx_ptr, parts_ptr, rows, channels, dy_stride, x_stride,
    RMS: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx of one split of the rows, and its sums of dy n and of dy."""
    c = tl.arange(0, CHANNELS)
    mask_c = c < channels
    split, splits = tl.program_id(0), tl.num_programs(0)
    through, plain = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    if WEIGHT:
        gain = tl.load(weight_ptr + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    for tile in tl.range(split, tl.cdiv(rows, ROWS), splits, num_stages=STAGES):
        r = tile * ROWS + tl.arange(0, ROWS)
        inside = r < rows
        r64 = r.to(tl.int64)
        mask = inside[:, None] & mask_c[None, :]
        dy = tl.load(dy_ptr + r64[:, None] * dy_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + r64[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstds_ptr + r64, mask=inside, other=0.0)[:, None]
        if not RMS:
            x -= tl.load(means_ptr + r64, mask=inside, other=0.0)[:, None]
        normal = tl.where(mask, x * rstd, 0.0)
        g = dy
        if WEIGHT:
            g = dy * gain
        dx = g - normal * (tl.sum(g * normal, 1) / channels)[:, None]
        if not RMS:
            dx -= (tl.sum(g, 1) / channels)[:, None]
        dx *= rstd
        tl.store(dx_ptr + r64[:, None] * channels + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        through += tl.sum(dy * normal, 0)
        plain += tl.sum(dy, 0)
    out = parts_ptr + split.to(tl.int64) * 2 * channels + c
    tl.store(out, through, mask=mask_c)
    tl.store(out + channels, plain, mask=mask_c)


# --- the ops ---


WARPS = 16
TILE = 4 * 32 * WARPS  # elements: four per thread in each stage; with more, the sums do not fit into registers
AHEAD = 32768  # bytes of an input in flight


def _layout(channels: int, dtype: torch.dtype) -> dict[str, Any]:
    tile = rows_of_tile(channels, TILE)
    rows = min(16, tile.rows)
    stages = max(1, min(4, AHEAD // (rows * tile.channels * dtype.itemsize)))
    return {"ROWS": rows, "CHANNELS": tile.channels, "STAGES": stages, "num_warps": WARPS}


@norm_with_moments.backend("triton")
def norm(
    rows: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    spec: Spec,
    y: Tensor,
    into: RawMoments,
    valid: Tensor | None,
    add: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.observed.norm_with_moments`; ``into`` is an accumulator with `splits_of_rows` splits."""
    rows, gain, bias = laid_out(rows), side_by_side(gain), side_by_side(bias)
    length, channels = rows.shape
    means, rstds = (rows.new_empty(length, dtype=torch.float32) for _ in range(2))
    counts = torch.empty_like(into.seen)
    with torch.cuda.device_of(rows):  # a kernel runs on the current device, whatever the device of its arguments
        _observed[(len(into.seen),)](
            rows, rows if gain is None else gain, rows if bias is None else bias, y, means, rstds,
            as_bytes(valid, rows), into.seen, counts, into.channel, into.token, length, channels, rows.stride(0),
            into.channel.stride(0), into.channel.stride(1), into.token.stride(0), spec.eps,
            RMS=spec.kind == "rms", WEIGHT=gain is not None, BIAS=bias is not None, MASKED=valid is not None,
            TOKENS=spec.tokens, NORMALIZED=spec.normalized, ADD=add, **_layout(channels, rows.dtype),
        )  # fmt: skip
    if add:
        into.seen.add_(counts)
    return means, rstds


@triton_op("stabnorm::triton_norm_gradient", mutates_args={})
def _gradient_op(
    dy: Tensor, rows: Tensor, weight: Tensor | None, means: Tensor, rstds: Tensor, rms: bool
) -> tuple[Tensor, Tensor]:
    length, channels = rows.shape
    splits = splits_of_rows(rows.device.type, rows.device.index)
    dx = torch.empty((length, channels), dtype=rows.dtype, device=rows.device)
    parts = rows.new_empty((splits, 2, channels), dtype=torch.float32)
    traceable(_norm_gradient)[(splits,)](
        dy, rows, rows if weight is None else weight, means, rstds, dx, parts, length, channels, dy.stride(0),
        rows.stride(0), RMS=rms, WEIGHT=weight is not None, **_layout(channels, rows.dtype),
    )  # fmt: skip
    sums = rows.new_empty((2, channels), dtype=torch.float32)
    tile = split_tile(splits)
    traceable(add_splits)[(triton.cdiv(sums.numel(), tile["CHANNELS"]),)](
        parts, sums, splits, sums.numel(), SPLITS=tile["SPLITS"], SIZE=tile["CHANNELS"]
    )
    return dx, sums


@norm_gradient.backend("triton")
def gradient(
    dy: Tensor, rows: Tensor, gain: Tensor | None, means: Tensor, rstds: Tensor, kind: NormKind
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.observed.norm_gradient`."""
    dx, sums = _gradient_op(laid_out(dy), laid_out(rows), side_by_side(gain), means, rstds, kind == "rms")
    through, plain = sums.unbind()
    return dx, through, plain
