"""The kernels that fill, and merge, accumulators of moments: all that knows which row of them is which.

`add_rows` adds the moments of some rows, each program those of a split of the rows and of a block of channels.
`norm_rows` computes a norm, and adds the moments of its input on the way. An accumulator may have splits, one for each
program that adds to it. Then no program waits for another, and no atomics are needed. Once per step, `merge_layers`
merges all splits of all layers in one launch. The order of all additions is fixed.
"""

import triton
import triton.language as tl

from stabnorm.functional import moments as layout
from stabnorm.ops.triton.shared import lanes_merged, largest, largest_of, least, least_of, merged

# The layout of the moments, see `functional.RawMoments`, as constants that a kernel can read.
SHIFT_X = tl.constexpr(layout.SHIFT_X)
SHIFT_N = tl.constexpr(layout.SHIFT_N)
REST_X = tl.constexpr(layout.REST_X)
REST_N = tl.constexpr(layout.REST_N)
VAR_X = tl.constexpr(layout.VAR_X)
COV_XN = tl.constexpr(layout.COV_XN)
VAR_N = tl.constexpr(layout.VAR_N)
MAX = tl.constexpr(layout.MAX)
MIN = tl.constexpr(layout.MIN)
CHANNEL_ROWS = tl.constexpr(layout.CHANNEL_ROWS)
STD_MEAN = tl.constexpr(layout.STD_MEAN)
MEAN_MEAN = tl.constexpr(layout.MEAN_MEAN)
EPS_SHARE = tl.constexpr(layout.EPS_SHARE)
STD_MIN = tl.constexpr(layout.STD_MIN)
MEAN_MIN = tl.constexpr(layout.MEAN_MIN)
STD_MAX = tl.constexpr(layout.STD_MAX)
MEAN_MAX = tl.constexpr(layout.MEAN_MAX)
TOKEN_ROWS = tl.constexpr(layout.TOKEN_ROWS)


@triton.jit
def _add_moments(into, line_stride, mask_c, n_a, n_b, shift_b, rest_b, m2_b, most_b, fewest_b):
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
def _add_normalized(into, line_stride, mask_c, n_a, n_b, n_ab, share, delta, shift_b, rest_b, m2_b, both_b):
    """Add moments of the normalised input; call it after `_add_moments`, which returns n_ab, share and delta."""
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
def _add_tokens(line, n_a, count, std_b, mean_b, below_b, std_least, mean_least, std_most, mean_most):
    """Add statistics of ``count`` tokens to the token rows of an accumulator that has ``n_a`` tokens."""
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
def merge_layers(
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


@triton.jit
def add_rows(
    x_ptr, n_ptr, tokens_ptr, share_ptr, valid_ptr, before_ptr, after_ptr, channel_ptr, token_ptr,
    rows, channels, x_stride, n_stride, split_stride, line_stride, token_stride, eps,
    KIND: tl.constexpr, TOKENS: tl.constexpr, NORMALIZED: tl.constexpr, MASKED: tl.constexpr, SHARE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Add one split and one block of channels to the accumulator. KIND: 0 layer, 1 rms, 2 if n is an argument.

    Every block of channels reads how many rows there were before, and only one of them writes how many there are after:
    these two must not be the same memory.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    mask_c = c < channels
    n = tl.zeros([ROWS, 1], tl.float32)
    shift = tl.zeros([ROWS, CHANNELS], tl.float32)
    rest = tl.zeros([ROWS, CHANNELS], tl.float32)
    m2 = tl.zeros([ROWS, CHANNELS], tl.float32)
    most = tl.full([ROWS, CHANNELS], float("-inf"), tl.float32)
    fewest = tl.full([ROWS, CHANNELS], float("inf"), tl.float32)
    mean_n = tl.zeros([ROWS, CHANNELS], tl.float32)
    m2_n = tl.zeros([ROWS, CHANNELS], tl.float32)
    m2_xn = tl.zeros([ROWS, CHANNELS], tl.float32)
    std_mean = tl.zeros([ROWS], tl.float32)  # the next seven are over tokens, with a lane for each row of the tile
    mean_mean = tl.zeros([ROWS], tl.float32)
    below = tl.zeros([ROWS], tl.float32)
    std_least = tl.full([ROWS], float("inf"), tl.float32)
    mean_least = tl.full([ROWS], float("inf"), tl.float32)
    std_most = tl.full([ROWS], float("-inf"), tl.float32)
    mean_most = tl.full([ROWS], float("-inf"), tl.float32)
    for tile in range(split, tl.cdiv(rows, ROWS), splits * AHEAD):
        for ahead in tl.static_range(AHEAD):
            r = (tile + ahead * splits) * ROWS + tl.arange(0, ROWS)
            keep = r < rows
            if MASKED:
                keep = keep & (tl.load(valid_ptr + r, mask=keep, other=0) != 0)
            r64 = r.to(tl.int64)
            mask = keep[:, None] & mask_c[None, :]
            x = tl.load(x_ptr + r64[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
            n_before = n
            n += keep.to(tl.float32)[:, None]
            weight = 1.0 / tl.maximum(n, 1.0)  # weight of the new row in its lane
            most = largest(most, tl.where(keep[:, None], x, float("-inf")))
            fewest = least(fewest, tl.where(keep[:, None], x, float("inf")))
            shift = tl.where(keep[:, None] & (n_before == 0), x, shift)
            before = tl.where(keep[:, None], (x - shift) - rest, 0.0)
            rest += before * weight
            m2 += before * ((x - shift) - rest)
            if TOKENS or (NORMALIZED and KIND != 2):
                high = tl.load(tokens_ptr + 3 * r64, mask=keep, other=0.0)
                low = tl.load(tokens_ptr + 3 * r64 + 1, mask=keep, other=0.0)
                var = tl.load(tokens_ptr + 3 * r64 + 2, mask=keep, other=0.0)
                mean = high + low
                divided_by = var
                if KIND == 1:
                    divided_by = var + mean * mean
                if NORMALIZED and KIND != 2:
                    rstd = tl.rsqrt(divided_by + eps)
                    if KIND == 1:
                        normal = x * rstd[:, None]
                    else:
                        normal = ((x - high[:, None]) - low[:, None]) * rstd[:, None]
                if TOKENS and tl.program_id(0) == 0:
                    of_token = tl.sum(weight, 1)
                    std = tl.sqrt(var)
                    std_mean += tl.where(keep, std - std_mean, 0.0) * of_token
                    mean_mean += tl.where(keep, mean - mean_mean, 0.0) * of_token
                    if KIND != 2:
                        below += (keep & (divided_by < 10 * eps)).to(tl.float32)
                    std_least = least(std_least, tl.where(keep, std, float("inf")))
                    mean_least = least(mean_least, tl.where(keep, mean, float("inf")))
                    std_most = largest(std_most, tl.where(keep, std, float("-inf")))
                    mean_most = largest(mean_most, tl.where(keep, mean, float("-inf")))
            if NORMALIZED:
                if KIND == 2:
                    normal = tl.load(n_ptr + r64[:, None] * n_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
                before_n = tl.where(keep[:, None], normal - mean_n, 0.0)
                mean_n += before_n * weight
                m2_n += before_n * (normal - mean_n)
                m2_xn += before * (normal - mean_n)

    of_lane = n + tl.zeros_like(shift)
    n_b, shift_b, rest_b, m2_b, apart = lanes_merged(of_lane, shift, rest, m2)
    lane = of_lane > 0
    seen = tl.load(before_ptr + split)
    n_a = seen.to(tl.float32)
    into_ptr = channel_ptr + split.to(tl.int64) * split_stride + c
    n_ab, share, delta = _add_moments(
        into_ptr, line_stride, mask_c, n_a, n_b, shift_b, rest_b, m2_b,
        largest_of(tl.where(lane, most, float("-inf"))), least_of(fewest),
    )  # fmt: skip
    if NORMALIZED:
        zeros = tl.zeros_like(shift)
        _, shift_bn, rest_bn, m2_bn, apart_n = lanes_merged(of_lane, zeros, mean_n, m2_n)
        both_b = tl.sum(m2_xn + of_lane * apart * apart_n, 0)
        _add_normalized(into_ptr, line_stride, mask_c, n_a, n_b, n_ab, share, delta, shift_bn, rest_bn, m2_bn, both_b)
    if tl.program_id(0) == 0:
        lanes = tl.sum(n, 1)
        count = tl.sum(lanes, 0)
        tl.store(after_ptr + split, seen + count.to(tl.int64))
        if TOKENS and count > 0:
            below_b = tl.sum(below, 0) / count
            if SHARE:
                below_b = tl.load(share_ptr)
            _add_tokens(
                token_ptr + split * token_stride, n_a, count, tl.sum(lanes * std_mean, 0) / count,
                tl.sum(lanes * mean_mean, 0) / count, below_b, least_of(std_least), least_of(mean_least),
                largest_of(std_most), largest_of(mean_most),
            )  # fmt: skip


@triton.jit
def norm_rows(
    x_ptr, weight_ptr, bias_ptr, y_ptr, means_ptr, rstds_ptr, valid_ptr,
    seen_ptr, channel_ptr, token_ptr,
    rows, channels, row_stride, split_stride, line_stride, token_stride, eps,
    RMS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    TOKENS: tl.constexpr, NORMALIZED: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the norm of one split of the rows; with ADD also add its moments to the split's accumulator."""
    c = tl.arange(0, CHANNELS)
    mask_c = c < channels
    split, splits = tl.program_id(0), tl.num_programs(0)
    if ADD:
        seen = tl.load(seen_ptr + split)  # before the first sum over rows, for which all threads wait
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
        n_a = seen.to(tl.float32)
        accumulator = channel_ptr + split.to(tl.int64) * split_stride + c
        n_ab, share, delta = _add_moments(accumulator, line_stride, mask_c, n_a, n, shift, rest, m2, most, fewest)
        if NORMALIZED:
            _add_normalized(accumulator, line_stride, mask_c, n_a, n, n_ab, share, delta, shift_n, mean_n, m2_n, m2_xn)
        count = tl.max(n, 0)
        tl.store(seen_ptr + split, seen + count.to(tl.int64))
        if TOKENS and count > 0:
            _add_tokens(
                token_ptr + split * token_stride, n_a, count, tl.sum(counted * std_mean, 0) / count,
                tl.sum(counted * mean_mean, 0) / count, tl.sum(below, 0) / count, least_of(std_least),
                least_of(mean_least), largest_of(std_most), largest_of(mean_most),
            )  # fmt: skip
