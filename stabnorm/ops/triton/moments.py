"""The Triton backend of `moments`: it adds the moments of a forward to a layer's accumulator.

This takes one read of the input, or two reads with statistics of tokens or of the normalised input. The mean and
variance of a token must be known before its first channel can be normalised. The second read follows at once, so an
activation that fits the cache is read from memory only once.

The accumulator of a layer is plain (``seen []``, ``channel [9, C]``, ``token [7]``) or has splits of the rows as its
first axis, see `stabnorm.ops.triton.accumulators`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stabnorm.functional import Kind, RawMoments, empty_moments, merge_moments_, share_below
from stabnorm.ops.moments import add_moments_
from stabnorm.ops.triton.accumulators import add_moments, add_normalized, add_tokens, merge
from stabnorm.ops.triton.shared import (
    as_bytes,
    columns,
    laid_out,
    lanes_merged,
    largest,
    largest_of,
    least,
    least_of,
    rows_of_tile,
)

_KINDS = {"layer": 0, "rms": 1}  # the kinds whose tokens the kernel normalises


@triton.jit
def _tokens(x_ptr, out_ptr, rows, channels, row_stride, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Compute mean (a value and its rounding error) and biased variance of every token, ``[R, 3]``."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mean = tl.zeros([ROWS], tl.float32)
    rest = tl.zeros([ROWS], tl.float32)
    m2 = tl.zeros([ROWS], tl.float32)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        mask = (r < rows)[:, None] & (c < channels)[None, :]
        x = tl.load(x_ptr + r[:, None] * row_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        size = tl.minimum(channels - start, CHANNELS).to(tl.float32)
        mean = tl.where(start == 0, tl.sum(x, 1) / size, mean)
        x = tl.where(mask, x - mean[:, None], 0.0)
        of_block = tl.sum(x, 1) / size
        x = tl.where(mask, x - of_block[:, None], 0.0)
        share = size / (start + size)
        apart = of_block - rest
        rest += apart * share
        m2 += tl.sum(x * x, 1) + apart * apart * (start * share)
    tl.store(out_ptr + 3 * r, mean, mask=r < rows)
    tl.store(out_ptr + 3 * r + 1, rest, mask=r < rows)
    tl.store(out_ptr + 3 * r + 2, m2 / channels, mask=r < rows)


@triton.jit
def _add(
    x_ptr, n_ptr, tokens_ptr, share_ptr, valid_ptr, seen_ptr, counts_ptr, channel_ptr, token_ptr,
    rows, channels, x_stride, n_stride, split_stride, line_stride, token_stride, eps,
    KIND: tl.constexpr, TOKENS: tl.constexpr, NORMALIZED: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Add one split and one block of channels to the accumulator. KIND: 0 layer, 1 rms, 2 if n is an argument."""
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
    n_a = tl.load(seen_ptr + split).to(tl.float32)
    into_ptr = channel_ptr + split.to(tl.int64) * split_stride + c
    n_ab, share, delta = add_moments(
        into_ptr, line_stride, mask_c, n_a, n_b, shift_b, rest_b, m2_b,
        largest_of(tl.where(lane, most, float("-inf"))), least_of(fewest),
    )  # fmt: skip
    if NORMALIZED:
        zeros = tl.zeros_like(shift)
        _, shift_bn, rest_bn, m2_bn, apart_n = lanes_merged(of_lane, zeros, mean_n, m2_n)
        both_b = tl.sum(m2_xn + of_lane * apart * apart_n, 0)
        add_normalized(into_ptr, line_stride, mask_c, n_a, n_b, n_ab, share, delta, shift_bn, rest_bn, m2_bn, both_b)
    if tl.program_id(0) == 0:
        lanes = tl.sum(n, 1)
        count = tl.sum(lanes, 0)
        tl.store(counts_ptr + split, count.to(tl.int64))
        if TOKENS and count > 0:
            below_b = tl.sum(below, 0) / count
            if KIND == 2:
                below_b = tl.load(share_ptr)
            add_tokens(
                token_ptr + split * token_stride, n_a, count, tl.sum(lanes * std_mean, 0) / count,
                tl.sum(lanes * mean_mean, 0) / count, below_b, least_of(std_least), least_of(mean_least),
                largest_of(std_most), largest_of(mean_most),
            )  # fmt: skip


@add_moments_.backend("triton", in_graphs=True)
def add_moments_of_rows_(
    rows: Tensor,
    valid: Tensor | None,
    into: RawMoments,
    kind: Kind,
    eps: float,
    by_groups: Tensor | None,
    variances: Tensor | None,
    tokens: bool,
    normalized: bool,
    fresh: bool,
) -> None:
    """See `ops.moments.add_moments_`."""
    with torch.cuda.device_of(rows):  # a kernel runs on the current device, whatever the device of its arguments
        _add_moments_(rows, valid, into, kind, eps, by_groups, variances, tokens, normalized)


def _add_moments_(
    rows: Tensor,
    valid: Tensor | None,
    into: RawMoments,
    kind: Kind,
    eps: float,
    by_groups: Tensor | None,
    variances: Tensor | None,
    tokens: bool,
    normalized: bool,
) -> None:
    if into.seen.ndim == 0:
        parts = empty_moments(columns(rows.shape[1], rows.device).splits, rows.shape[1], rows.device)
        _add_moments_(rows, valid, parts, kind, eps, by_groups, variances, tokens, normalized)
        (one,) = zip(*merge(*(part[None] for part in parts)), strict=True)
        merge_moments_(into, RawMoments(*one))
        return
    rows = laid_out(rows)
    length, channels = rows.shape
    given = kind not in _KINDS
    normalized = normalized and not (given and by_groups is None)
    per_token = rows
    if tokens or (normalized and not given):
        per_token = rows.new_empty(length, 3, dtype=torch.float32)
        tile = rows_of_tile(min(channels, 1024))
        _tokens[(triton.cdiv(length, tile.rows),)](
            rows, per_token, length, channels, rows.stride(0), ROWS=tile.rows, CHANNELS=tile.channels,
            num_warps=tile.warps,
        )  # fmt: skip
    n = rows if by_groups is None else laid_out(by_groups)
    share = (
        rows.new_zeros((), dtype=torch.float32)
        if variances is None
        else share_below(variances.flatten(), 10 * eps, None)
    )
    where = columns(channels, rows.device)
    counts = torch.empty_like(into.seen)
    _add[(where.blocks, len(into.seen))](
        rows, n, per_token, share, as_bytes(valid, rows), into.seen, counts, into.channel, into.token,
        length, channels, rows.stride(0), n.stride(0), into.channel.stride(0), into.channel.stride(1),
        into.token.stride(0), eps,
        KIND=_KINDS.get(kind, 2), TOKENS=tokens, NORMALIZED=normalized, MASKED=valid is not None,
        ROWS=where.rows, CHANNELS=where.channels, AHEAD=max(1, where.ahead // 2),
    )  # fmt: skip
    into.seen.add_(counts)  # after the kernel, because every block of channels reads the old count
