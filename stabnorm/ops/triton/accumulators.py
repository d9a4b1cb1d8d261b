"""Device functions that add the moments of some rows to a layer's accumulator, and the kernel that merges splits.

An accumulator may have splits, one for each program that adds to it. Then no program waits for another, and no atomics
are needed. Once per step, `merge` merges all splits of all layers in one launch. The order of all additions is fixed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stabnorm import functional
from stabnorm.functional import RawMoments
from stabnorm.ops.accumulators import merge_splits
from stabnorm.ops.triton.shared import lanes_merged, largest, largest_of, least, least_of, merged, split_tile

# The layout of the moments, see `functional.RawMoments`, as constants that a kernel can read.
SHIFT_X = tl.constexpr(functional.SHIFT_X)
SHIFT_N = tl.constexpr(functional.SHIFT_N)
REST_X = tl.constexpr(functional.REST_X)
REST_N = tl.constexpr(functional.REST_N)
VAR_X = tl.constexpr(functional.VAR_X)
COV_XN = tl.constexpr(functional.COV_XN)
VAR_N = tl.constexpr(functional.VAR_N)
MAX = tl.constexpr(functional.MAX)
MIN = tl.constexpr(functional.MIN)
CHANNEL_ROWS = tl.constexpr(functional.CHANNEL_ROWS)
STD_MEAN = tl.constexpr(functional.STD_MEAN)
MEAN_MEAN = tl.constexpr(functional.MEAN_MEAN)
EPS_SHARE = tl.constexpr(functional.EPS_SHARE)
STD_MIN = tl.constexpr(functional.STD_MIN)
MEAN_MIN = tl.constexpr(functional.MEAN_MIN)
STD_MAX = tl.constexpr(functional.STD_MAX)
MEAN_MAX = tl.constexpr(functional.MEAN_MAX)
TOKEN_ROWS = tl.constexpr(functional.TOKEN_ROWS)


@triton.jit
def add_moments(into, line_stride, mask_c, n_a, n_b, shift_b, rest_b, m2_b, most_b, fewest_b):
    """Add moments of x, ``[C]`` each, to the accumulator at ``into [C]`` that has ``n_a`` rows.

    Return the new number of rows, the share of the new rows, and the difference of their mean from the old mean.
    """
    old = mask_c & (n_a + tl.zeros_like(n_b) > 0)
    n_ab, shift_ab, rest_ab, m2_ab, share, delta = merged(
        n_a, tl.load(into + SHIFT_X * line_stride, mask=old, other=0.0),
        tl.load(into + REST_X * line_stride, mask=old, other=0.0),
        n_a * tl.load(into + VAR_X * line_stride, mask=old, other=0.0), n_b, shift_b, rest_b, m2_b,
    )  # fmt: skip
    new = mask_c & (n_b > 0)
    tl.store(into + SHIFT_X * line_stride, shift_ab, mask=new)
    tl.store(into + REST_X * line_stride, rest_ab, mask=new)
    tl.store(into + VAR_X * line_stride, m2_ab / tl.maximum(n_ab, 1.0), mask=new)
    old_most = tl.load(into + MAX * line_stride, mask=old, other=float("-inf"))
    old_fewest = tl.load(into + MIN * line_stride, mask=old, other=float("inf"))
    tl.store(into + MAX * line_stride, largest(old_most, most_b), mask=new)
    tl.store(into + MIN * line_stride, least(old_fewest, fewest_b), mask=new)
    return n_ab, share, delta


@triton.jit
def add_normalized(into, line_stride, mask_c, n_a, n_b, n_ab, share, delta, shift_b, rest_b, m2_b, both_b):
    """Add moments of the normalised input; call it after `add_moments`, which returns n_ab, share and delta."""
    old = mask_c & (n_a + tl.zeros_like(n_b) > 0)
    new = mask_c & (n_b > 0)
    _, shift_n, rest_n, m2_nn, _, delta_n = merged(
        n_a, tl.load(into + SHIFT_N * line_stride, mask=old, other=0.0),
        tl.load(into + REST_N * line_stride, mask=old, other=0.0),
        n_a * tl.load(into + VAR_N * line_stride, mask=old, other=0.0), n_b, shift_b, rest_b, m2_b,
    )  # fmt: skip
    both = n_a * tl.load(into + COV_XN * line_stride, mask=old, other=0.0) + both_b + delta * delta_n * (n_a * share)
    tl.store(into + SHIFT_N * line_stride, shift_n, mask=new)
    tl.store(into + REST_N * line_stride, rest_n, mask=new)
    tl.store(into + COV_XN * line_stride, both / tl.maximum(n_ab, 1.0), mask=new)
    tl.store(into + VAR_N * line_stride, m2_nn / tl.maximum(n_ab, 1.0), mask=new)


@triton.jit
def add_tokens(line, n_a, count, std_b, mean_b, below_b, std_least, mean_least, std_most, mean_most):
    """Add statistics of ``count`` tokens to the line ``[7]`` of an accumulator that has ``n_a`` tokens."""
    of_new = count / (n_a + count)
    std_a, mean_a, below_a = tl.load(line + STD_MEAN), tl.load(line + MEAN_MEAN), tl.load(line + EPS_SHARE)
    tl.store(line + STD_MEAN, std_a + (std_b - std_a) * of_new)
    tl.store(line + MEAN_MEAN, mean_a + (mean_b - mean_a) * of_new)
    tl.store(line + EPS_SHARE, below_a + (below_b - below_a) * of_new)
    tl.store(line + STD_MIN, least(tl.load(line + STD_MIN), std_least))
    tl.store(line + MEAN_MIN, least(tl.load(line + MEAN_MIN), mean_least))
    tl.store(line + STD_MAX, largest(tl.load(line + STD_MAX), std_most))
    tl.store(line + MEAN_MAX, largest(tl.load(line + MEAN_MAX), mean_most))


@triton.jit
def _merge(
    seen_ptr, channel_ptr, token_ptr, seen_out, channel_out, token_out, splits, channels,
    SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge all splits of one layer and one block of channels to one accumulator."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    layer = tl.program_id(1).to(tl.int64)
    n = tl.zeros([SPLITS, CHANNELS], tl.float32)
    shift, rest, m2 = tl.zeros_like(n), tl.zeros_like(n), tl.zeros_like(n)
    shift_n, rest_n, m2_n, m2_xn = tl.zeros_like(n), tl.zeros_like(n), tl.zeros_like(n), tl.zeros_like(n)
    most = tl.full([SPLITS, CHANNELS], float("-inf"), tl.float32)
    fewest = tl.full([SPLITS, CHANNELS], float("inf"), tl.float32)
    for start in range(0, splits, SPLITS):
        s = start + tl.arange(0, SPLITS)
        seen = tl.load(seen_ptr + layer * splits + s, mask=s < splits, other=0).to(tl.float32)
        mask = (seen > 0)[:, None] & (c < channels)[None, :]
        at = channel_ptr + (layer * splits + s)[:, None] * (CHANNEL_ROWS * channels) + c[None, :]
        n_b = tl.where(mask, seen[:, None], 0.0)
        n_ab, shift, rest, m2, share, delta = merged(
            n, shift, rest, m2, n_b, tl.load(at + SHIFT_X * channels, mask=mask, other=0.0),
            tl.load(at + REST_X * channels, mask=mask, other=0.0),
            n_b * tl.load(at + VAR_X * channels, mask=mask, other=0.0),
        )  # fmt: skip
        _, shift_n, rest_n, m2_n, _, delta_n = merged(
            n, shift_n, rest_n, m2_n, n_b, tl.load(at + SHIFT_N * channels, mask=mask, other=0.0),
            tl.load(at + REST_N * channels, mask=mask, other=0.0),
            n_b * tl.load(at + VAR_N * channels, mask=mask, other=0.0),
        )  # fmt: skip
        m2_xn += n_b * tl.load(at + COV_XN * channels, mask=mask, other=0.0) + delta * delta_n * (n * share)
        most = largest(most, tl.load(at + MAX * channels, mask=mask, other=float("-inf")))
        fewest = least(fewest, tl.load(at + MIN * channels, mask=mask, other=float("inf")))
        n = n_ab
    total, shift_all, rest_all, m2_all, apart = lanes_merged(n, shift, rest, m2)
    _, shift_alln, rest_alln, m2_alln, apart_n = lanes_merged(n, shift_n, rest_n, m2_n)
    both = tl.sum(m2_xn + n * apart * apart_n, 0)
    size = tl.maximum(total, 1.0)
    out, inside, ran = channel_out + layer * (CHANNEL_ROWS * channels) + c, c < channels, total > 0
    tl.store(out + SHIFT_X * channels, shift_all, mask=inside)
    tl.store(out + SHIFT_N * channels, shift_alln, mask=inside)
    tl.store(out + REST_X * channels, rest_all, mask=inside)
    tl.store(out + REST_N * channels, rest_alln, mask=inside)
    tl.store(out + VAR_X * channels, m2_all / size, mask=inside)
    tl.store(out + COV_XN * channels, both / size, mask=inside)
    tl.store(out + VAR_N * channels, m2_alln / size, mask=inside)
    tl.store(out + MAX * channels, tl.where(ran, largest_of(most), 0.0), mask=inside)
    tl.store(out + MIN * channels, tl.where(ran, least_of(fewest), 0.0), mask=inside)
    if tl.program_id(0) == 0:
        _merge_tokens(seen_ptr, token_ptr, seen_out, token_out, layer, splits, SPLITS)


@triton.jit
def _merge_tokens(seen_ptr, token_ptr, seen_out, token_out, layer, splits, SPLITS: tl.constexpr):
    count = tl.zeros([SPLITS], tl.int64)
    n = tl.zeros([SPLITS], tl.float32)
    std, mean, below = tl.zeros_like(n), tl.zeros_like(n), tl.zeros_like(n)
    std_least = tl.full([SPLITS], float("inf"), tl.float32)
    mean_least = tl.full([SPLITS], float("inf"), tl.float32)
    std_most = tl.full([SPLITS], float("-inf"), tl.float32)
    mean_most = tl.full([SPLITS], float("-inf"), tl.float32)
    for start in range(0, splits, SPLITS):
        s = start + tl.arange(0, SPLITS)
        mask_s = s < splits
        seen = tl.load(seen_ptr + layer * splits + s, mask=mask_s, other=0)
        count += seen
        n_b = seen.to(tl.float32)
        n += n_b
        share = n_b / tl.maximum(n, 1.0)
        at = token_ptr + (layer * splits + s) * TOKEN_ROWS
        nonempty = n_b > 0
        std += share * tl.where(nonempty, tl.load(at + STD_MEAN, mask=nonempty, other=0.0) - std, 0.0)
        mean += share * tl.where(nonempty, tl.load(at + MEAN_MEAN, mask=nonempty, other=0.0) - mean, 0.0)
        below += share * tl.where(nonempty, tl.load(at + EPS_SHARE, mask=nonempty, other=0.0) - below, 0.0)
        std_least = least(std_least, tl.load(at + STD_MIN, mask=nonempty, other=float("inf")))
        mean_least = least(mean_least, tl.load(at + MEAN_MIN, mask=nonempty, other=float("inf")))
        std_most = largest(std_most, tl.load(at + STD_MAX, mask=nonempty, other=float("-inf")))
        mean_most = largest(mean_most, tl.load(at + MEAN_MAX, mask=nonempty, other=float("-inf")))
    share = n / tl.maximum(tl.sum(n, 0), 1.0)
    out = token_out + layer * TOKEN_ROWS
    tl.store(seen_out + layer, tl.sum(count, 0))
    tl.store(out + STD_MEAN, tl.sum(share * std, 0))
    tl.store(out + MEAN_MEAN, tl.sum(share * mean, 0))
    tl.store(out + EPS_SHARE, tl.sum(share * below, 0))
    tl.store(out + STD_MIN, least_of(std_least))
    tl.store(out + MEAN_MIN, least_of(mean_least))
    tl.store(out + STD_MAX, largest_of(std_most))
    tl.store(out + MEAN_MAX, largest_of(mean_most))


@merge_splits.backend("triton")
def merge(seen: Tensor, channel: Tensor, token: Tensor) -> RawMoments:
    """See `ops.accumulators.merge_splits`; a layer that did not run gets 0."""
    layers, splits, channel_rows, channels = channel.shape
    out = RawMoments(
        seen.new_empty(layers),
        channel.new_empty(layers, channel_rows, channels),
        token.new_empty(layers, token.shape[2]),
    )
    tile = split_tile(splits)
    with torch.cuda.device_of(channel):  # a kernel is launched on the current device, whatever it is given
        grid = triton.cdiv(channels, tile["CHANNELS"]), layers
        _merge[grid](seen, channel, token, *out, splits, channels, **tile)
    return out
