"""The GPU body of `moments`: what a forward adds to a layer's account, in one read, or two with the tokens' statistics.

The account of a layer may be one (``seen []``, ``channel [9, C]``, ``token [7]``) or one for every split of the rows,
with the splits as first axis. Then a forward touches nothing but its own splits, and `merge_splits` makes one account
of each layer's, for all layers in one launch, once a step. No atomics: which program adds what, and in which order, is
fixed.

The second read is for what the norm makes of x: a token's mean and variance must be known before the first of its
channels can be normalised. It follows at once, so that of an activation that fits the cache it reads no memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stabnorm.functional import Kind, RawMoments, empty_moments, merge_moments_, share_below
from stabnorm.ops._triton_shared import (
    as_bytes,
    columns,
    laid_out,
    lanes_merged,
    largest,
    largest_of,
    least,
    least_of,
    merged,
    rows_of_tile,
)

_KINDS = {"layer": 0, "rms": 1}  # those whose tokens are normalised here


@triton.jit
def _tokens(x_ptr, out_ptr, rows, channels, row_stride, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean, as a value and what rounding left of it, and biased variance of every token: ``[R, 3]``."""
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
    """One split of one block of channels, merged with what its account holds. KIND: 0 layer, 1 rms, 2 n is given."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    there = c < channels
    n = tl.zeros([ROWS, 1], tl.float32)
    shift = tl.zeros([ROWS, CHANNELS], tl.float32)
    rest = tl.zeros([ROWS, CHANNELS], tl.float32)
    m2 = tl.zeros([ROWS, CHANNELS], tl.float32)
    most = tl.full([ROWS, CHANNELS], float("-inf"), tl.float32)
    fewest = tl.full([ROWS, CHANNELS], float("inf"), tl.float32)
    mean_n = tl.zeros([ROWS, CHANNELS], tl.float32)
    m2_n = tl.zeros([ROWS, CHANNELS], tl.float32)
    m2_xn = tl.zeros([ROWS, CHANNELS], tl.float32)
    std_mean = tl.zeros([ROWS], tl.float32)  # and the others over the tokens, a lane for each row of the tile
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
            mask = keep[:, None] & there[None, :]
            x = tl.load(x_ptr + r64[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
            n_before = n
            n += keep.to(tl.float32)[:, None]
            weight = 1.0 / tl.maximum(n, 1.0)  # of the new row in its lane
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
    n_a = tl.load(seen_ptr + split).to(tl.float32)
    account = channel_ptr + split.to(tl.int64) * split_stride + c
    old = there & (n_a + tl.zeros_like(n_b) > 0)
    n_ab, shift_ab, rest_ab, m2_ab, share, delta = merged(
        n_a, tl.load(account, mask=old, other=0.0), tl.load(account + 2 * line_stride, mask=old, other=0.0),
        n_a * tl.load(account + 4 * line_stride, mask=old, other=0.0), n_b, shift_b, rest_b, m2_b,
    )  # fmt: skip
    new = there & (n_b > 0)
    tl.store(account, shift_ab, mask=new)
    tl.store(account + 2 * line_stride, rest_ab, mask=new)
    tl.store(account + 4 * line_stride, m2_ab / tl.maximum(n_ab, 1.0), mask=new)
    old_most = tl.load(account + 7 * line_stride, mask=old, other=float("-inf"))
    old_fewest = tl.load(account + 8 * line_stride, mask=old, other=float("inf"))
    lane = of_lane > 0
    most = tl.where(lane, most, float("-inf"))
    tl.store(account + 7 * line_stride, largest(old_most, largest_of(most)), mask=new)
    tl.store(account + 8 * line_stride, least(old_fewest, least_of(fewest)), mask=new)
    if NORMALIZED:
        zeros = tl.zeros_like(shift)
        _, shift_bn, rest_bn, m2_bn, apart_n = lanes_merged(of_lane, zeros, mean_n, m2_n)
        both_b = tl.sum(m2_xn + of_lane * apart * apart_n, 0)
        _, shift_n, rest_n, m2_nn, _, delta_n = merged(
            n_a, tl.load(account + line_stride, mask=old, other=0.0),
            tl.load(account + 3 * line_stride, mask=old, other=0.0),
            n_a * tl.load(account + 6 * line_stride, mask=old, other=0.0), n_b, shift_bn, rest_bn, m2_bn,
        )  # fmt: skip
        both = n_a * tl.load(account + 5 * line_stride, mask=old, other=0.0) + both_b + delta * delta_n * (n_a * share)
        tl.store(account + line_stride, shift_n, mask=new)
        tl.store(account + 3 * line_stride, rest_n, mask=new)
        tl.store(account + 5 * line_stride, both / tl.maximum(n_ab, 1.0), mask=new)
        tl.store(account + 6 * line_stride, m2_nn / tl.maximum(n_ab, 1.0), mask=new)
    if tl.program_id(0) == 0:
        lanes = tl.sum(n, 1)
        count = tl.sum(lanes, 0)
        tl.store(counts_ptr + split, count.to(tl.int64))
        if TOKENS and count > 0:
            line = token_ptr + split * token_stride
            of_new = count / (n_a + count)
            std_b = tl.sum(lanes * std_mean, 0) / count
            mean_b = tl.sum(lanes * mean_mean, 0) / count
            below_b = tl.sum(below, 0) / count
            if KIND == 2:
                below_b = tl.load(share_ptr)
            std_a, mean_a, below_a = tl.load(line), tl.load(line + 1), tl.load(line + 2)
            tl.store(line, std_a + (std_b - std_a) * of_new)
            tl.store(line + 1, mean_a + (mean_b - mean_a) * of_new)
            tl.store(line + 2, below_a + (below_b - below_a) * of_new)
            tl.store(line + 3, least(tl.load(line + 3), least_of(std_least)))
            tl.store(line + 4, least(tl.load(line + 4), least_of(mean_least)))
            tl.store(line + 5, largest(tl.load(line + 5), largest_of(std_most)))
            tl.store(line + 6, largest(tl.load(line + 6), largest_of(mean_most)))


@triton.jit
def _merge(
    seen_ptr, channel_ptr, token_ptr, seen_out, channel_out, token_out, splits, channels,
    SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """All splits of one layer, one block of channels, as one account."""
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
        there = (seen > 0)[:, None] & (c < channels)[None, :]
        at = channel_ptr + (layer * splits + s)[:, None] * (9 * channels) + c[None, :]
        n_b = tl.where(there, seen[:, None], 0.0)
        n_ab, shift, rest, m2, share, delta = merged(
            n, shift, rest, m2, n_b, tl.load(at, mask=there, other=0.0),
            tl.load(at + 2 * channels, mask=there, other=0.0),
            n_b * tl.load(at + 4 * channels, mask=there, other=0.0),
        )  # fmt: skip
        _, shift_n, rest_n, m2_n, _, delta_n = merged(
            n, shift_n, rest_n, m2_n, n_b, tl.load(at + channels, mask=there, other=0.0),
            tl.load(at + 3 * channels, mask=there, other=0.0),
            n_b * tl.load(at + 6 * channels, mask=there, other=0.0),
        )  # fmt: skip
        m2_xn += n_b * tl.load(at + 5 * channels, mask=there, other=0.0) + delta * delta_n * (n * share)
        most = largest(most, tl.load(at + 7 * channels, mask=there, other=float("-inf")))
        fewest = least(fewest, tl.load(at + 8 * channels, mask=there, other=float("inf")))
        n = n_ab
    total, shift_all, rest_all, m2_all, apart = lanes_merged(n, shift, rest, m2)
    _, shift_alln, rest_alln, m2_alln, apart_n = lanes_merged(n, shift_n, rest_n, m2_n)
    both = tl.sum(m2_xn + n * apart * apart_n, 0)
    size = tl.maximum(total, 1.0)
    out, inside, ran = channel_out + layer * (9 * channels) + c, c < channels, total > 0
    tl.store(out, shift_all, mask=inside)
    tl.store(out + channels, shift_alln, mask=inside)
    tl.store(out + 2 * channels, rest_all, mask=inside)
    tl.store(out + 3 * channels, rest_alln, mask=inside)
    tl.store(out + 4 * channels, m2_all / size, mask=inside)
    tl.store(out + 5 * channels, both / size, mask=inside)
    tl.store(out + 6 * channels, m2_alln / size, mask=inside)
    tl.store(out + 7 * channels, tl.where(ran, largest_of(most), 0.0), mask=inside)
    tl.store(out + 8 * channels, tl.where(ran, least_of(fewest), 0.0), mask=inside)
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
        there = s < splits
        seen = tl.load(seen_ptr + layer * splits + s, mask=there, other=0)
        count += seen
        n_b = seen.to(tl.float32)
        n += n_b
        share = n_b / tl.maximum(n, 1.0)
        at = token_ptr + (layer * splits + s) * 7
        there = n_b > 0
        std += share * tl.where(there, tl.load(at, mask=there, other=0.0) - std, 0.0)
        mean += share * tl.where(there, tl.load(at + 1, mask=there, other=0.0) - mean, 0.0)
        below += share * tl.where(there, tl.load(at + 2, mask=there, other=0.0) - below, 0.0)
        std_least = least(std_least, tl.load(at + 3, mask=there, other=float("inf")))
        mean_least = least(mean_least, tl.load(at + 4, mask=there, other=float("inf")))
        std_most = largest(std_most, tl.load(at + 5, mask=there, other=float("-inf")))
        mean_most = largest(mean_most, tl.load(at + 6, mask=there, other=float("-inf")))
    share = n / tl.maximum(tl.sum(n, 0), 1.0)
    out = token_out + layer * 7
    tl.store(seen_out + layer, tl.sum(count, 0))
    tl.store(out, tl.sum(share * std, 0))
    tl.store(out + 1, tl.sum(share * mean, 0))
    tl.store(out + 2, tl.sum(share * below, 0))
    tl.store(out + 3, least_of(std_least))
    tl.store(out + 4, least_of(mean_least))
    tl.store(out + 5, largest_of(std_most))
    tl.store(out + 6, largest_of(mean_most))


def splits_of(channels: int, device: torch.device) -> int:
    """Accounts that a layer of so many channels fills at once."""
    return columns(channels, device).splits


def add_moments_of_rows_(
    into: RawMoments,
    rows: Tensor,
    kind: Kind,
    eps: float,
    by_groups: Tensor | None,
    variances: Tensor | None,
    valid: Tensor | None,
    tokens: bool,
    normalized: bool,
) -> None:
    """`functional.raw_moments` of ``rows [R, C]``, of any floating dtype but float64, added to ``into``."""
    if into.seen.ndim == 0:
        parts = empty_moments(splits_of(rows.shape[1], rows.device), rows.shape[1], rows.device)
        add_moments_of_rows_(parts, rows, kind, eps, by_groups, variances, valid, tokens, normalized)
        (one,) = zip(*merge_splits(RawMoments(*(part[None] for part in parts))), strict=True)
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
    into.seen.add_(counts)  # by itself: every block of channels reads what was seen before


def merge_splits(parts: RawMoments) -> RawMoments:
    """One account for each layer, ``seen [L]``, from those of its splits, ``seen [L, S]``; what ran not is 0."""
    layers, splits, _, channels = parts.channel.shape
    out = RawMoments(
        parts.seen.new_empty(layers), parts.channel.new_empty(layers, 9, channels), parts.token.new_empty(layers, 7)
    )
    tile = {"SPLITS": min(64, max(2, triton.next_power_of_2(splits))), "CHANNELS": 16}
    _merge[(triton.cdiv(channels, 16), layers)](*parts, *out, splits, channels, **tile)
    return out
