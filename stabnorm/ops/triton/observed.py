"""The Triton backend of `observed`: LayerNorm or RMSNorm, and the moments of its input for a monitor, in one read.

Each program holds whole rows, processes its share of the tiles, and keeps the moments of the columns in registers. At
the end it adds them to its own split of the layer's accumulator, see `stabnorm.ops.triton.accumulating`. So there is no
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
from stabnorm.ops.triton.accumulating import norm_rows
from stabnorm.ops.triton.rows import add_splits
from stabnorm.ops.triton.shared import (
    as_bytes,
    laid_out,
    rows_of_tile,
    side_by_side,
    split_tile,
    splits_of_rows,
    traceable,
)


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
    with torch.cuda.device_of(rows):  # a kernel runs on the current device, whatever the device of its arguments
        norm_rows[(len(into.seen),)](
            rows, rows if gain is None else gain, rows if bias is None else bias, y, means, rstds,
            as_bytes(valid, rows), into.seen, into.channel, into.token, length, channels, rows.stride(0),
            into.channel.stride(0), into.channel.stride(1), into.token.stride(0), spec.eps,
            RMS=spec.kind == "rms", WEIGHT=gain is not None, BIAS=bias is not None, MASKED=valid is not None,
            TOKENS=spec.tokens, NORMALIZED=spec.normalized, ADD=add, **_layout(channels, rows.dtype),
        )  # fmt: skip
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
