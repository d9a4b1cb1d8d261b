"""What a kernel that has seen some rows does with a layer's account, and what makes one account of many.

An account may be in splits, one for each program that adds to it: then nobody waits for another, and there are no
atomics. `merge_splits` makes one of all splits, for all layers in one launch, once a step. Which program adds what, and
in which order, is fixed.
"""

import triton
import triton.language as tl

from stabnorm.functional import RawMoments
from stabnorm.ops.triton.shared import lanes_merged, largest, largest_of, least, least_of, merged, split_tile


@triton.jit
def add_moments(account, line_stride, there, n_a, n_b, shift_b, rest_b, m2_b, most_b, fewest_b):
    """Add what was seen of x, ``[C]`` each, to the account that starts at ``account [C]`` and has seen ``n_a`` rows.

    Returns how many there are now, the new ones' share and how far their mean is from that of the others.
    """
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
    tl.store(account + 7 * line_stride, largest(old_most, most_b), mask=new)
    tl.store(account + 8 * line_stride, least(old_fewest, fewest_b), mask=new)
    return n_ab, share, delta


@triton.jit
def add_normalized(account, line_stride, there, n_a, n_b, n_ab, share, delta, shift_b, rest_b, m2_b, both_b):
    """Add what was seen of the normalised input; after `add_moments`, which gives n_ab, share and delta."""
    old = there & (n_a + tl.zeros_like(n_b) > 0)
    new = there & (n_b > 0)
    _, shift_n, rest_n, m2_nn, _, delta_n = merged(
        n_a, tl.load(account + line_stride, mask=old, other=0.0),
        tl.load(account + 3 * line_stride, mask=old, other=0.0),
        n_a * tl.load(account + 6 * line_stride, mask=old, other=0.0), n_b, shift_b, rest_b, m2_b,
    )  # fmt: skip
    both = n_a * tl.load(account + 5 * line_stride, mask=old, other=0.0) + both_b + delta * delta_n * (n_a * share)
    tl.store(account + line_stride, shift_n, mask=new)
    tl.store(account + 3 * line_stride, rest_n, mask=new)
    tl.store(account + 5 * line_stride, both / tl.maximum(n_ab, 1.0), mask=new)
    tl.store(account + 6 * line_stride, m2_nn / tl.maximum(n_ab, 1.0), mask=new)


@triton.jit
def add_tokens(line, n_a, count, std_b, mean_b, below_b, std_least, mean_least, std_most, mean_most):
    """Add what was seen of ``count`` tokens to the line ``[7]`` of an account that has seen ``n_a``."""
    of_new = count / (n_a + count)
    std_a, mean_a, below_a = tl.load(line), tl.load(line + 1), tl.load(line + 2)
    tl.store(line, std_a + (std_b - std_a) * of_new)
    tl.store(line + 1, mean_a + (mean_b - mean_a) * of_new)
    tl.store(line + 2, below_a + (below_b - below_a) * of_new)
    tl.store(line + 3, least(tl.load(line + 3), std_least))
    tl.store(line + 4, least(tl.load(line + 4), mean_least))
    tl.store(line + 5, largest(tl.load(line + 5), std_most))
    tl.store(line + 6, largest(tl.load(line + 6), mean_most))


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


def merge_splits(parts: RawMoments) -> RawMoments:
    """One account for each layer, ``seen [L]``, from those of its splits, ``seen [L, S]``; what ran not is 0."""
    layers, splits, _, channels = parts.channel.shape
    out = RawMoments(
        parts.seen.new_empty(layers), parts.channel.new_empty(layers, 9, channels), parts.token.new_empty(layers, 7)
    )
    tile = split_tile(splits)
    _merge[(triton.cdiv(channels, tile["CHANNELS"]), layers)](*parts, *out, splits, channels, **tile)
    return out
