"""The formulas, once: pure functions of tensors. Every faster execution must equal what stands here.

Shape legend: R rows (tokens), C channels. *Per channel* means over the rows (what BatchNorm sees), *per token* means
over the channels (what LayerNorm sees). Nothing here computes a variance as E[x^2] - E[x]^2: at a mean of 1e4 and a
standard deviation of 1 that leaves no digit in float32.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["layer", "rms", "batch", "group", "instance"]

# Rows of `RawMoments.channel` and `RawMoments.token`; x is the norm's input, n what it normalises it to.
SHIFT_X, SHIFT_N, REST_X, REST_N, VAR_X, COV_XN, VAR_N, MAX, MIN = range(9)
STD_MEAN, MEAN_MEAN, EPS_SHARE, STD_MIN, MEAN_MIN, STD_MAX, MEAN_MAX = range(7)
CHANNEL_ROWS, TOKEN_ROWS = 9, 7


class RawMoments(NamedTuple):
    """What one forward adds to a layer's account; two of them merge exactly (`merge_moments_`).

    Attributes:
        seen: number of valid tokens, int64 scalar.
        channel: per channel, ``[9, C]``: means of x and n, each as shift + rest, because one float32 holds a mean of
            1e4 to 1e-3 only and that would be the error of every difference of means; then the variance of x, its
            covariance with n, and the variance of n, all divided by the count; then the largest and the least x.
        token: over tokens, ``[7]``: mean standard deviation, mean of the mean, share of variances the norm divides by
            that lie below 10 eps; least standard deviation and mean; largest standard deviation and mean.
    """

    seen: Tensor
    channel: Tensor
    token: Tensor


def empty_moments(layers: int, channels: int, device: torch.device | None = None) -> RawMoments:
    """The account of layers that saw nothing yet: ``seen [L]``, ``channel [L, 9, C]``, ``token [L, 7]``.

    >>> empty_moments(2, 3).channel.shape
    torch.Size([2, 9, 3])
    """
    with torch.inference_mode(False):  # or it could not be added to outside of it
        moments = RawMoments(
            torch.empty(layers, dtype=torch.int64, device=device),
            torch.empty(layers, CHANNEL_ROWS, channels, dtype=torch.float32, device=device),
            torch.empty(layers, TOKEN_ROWS, dtype=torch.float32, device=device),
        )
        clear_moments_(moments)
    return moments


def clear_moments_(moments: RawMoments) -> None:
    """Set the account back to nothing seen, in place."""
    moments.seen.zero_()
    moments.channel.zero_()
    moments.token[..., :STD_MIN].zero_()
    moments.token[..., STD_MIN:STD_MAX].fill_(torch.inf)
    moments.token[..., STD_MAX:].fill_(-torch.inf)


def merge_moments_(into: RawMoments, new: RawMoments) -> None:
    r"""Add ``new`` to ``into``, in place, as if both had been seen at once (Chan, Golub, LeVeque 1983).

    .. math:: w = n_b / (n_a + n_b),\quad \delta = \mu_b - \mu_a,\quad \mu = \mu_a + w \delta,\quad
              v = (1 - w) v_a + w v_b + w (1 - w) \delta^2

    Works on one layer (``channel [9, C]``) and on all at once (``[L, 9, C]``); an empty side leaves the other as it is.
    """
    total = into.seen + new.seen
    size = total.clamp(min=1).to(into.channel.dtype)  # a quotient of integers would be float32
    weight = (new.seen.to(into.channel.dtype) / size)[..., None, None]
    first = (into.seen == 0)[..., None, None]
    mine, theirs = into.channel, new.channel
    shift = mine[..., : SHIFT_N + 1, :]
    shift.copy_(torch.where(first, theirs[..., : SHIFT_N + 1, :], shift))  # the first to come sets the origin
    rests = theirs[..., REST_X : REST_N + 1, :] - mine[..., REST_X : REST_N + 1, :]
    delta = theirs[..., : SHIFT_N + 1, :] - shift + rests
    spread = weight * (1 - weight) * delta
    mine[..., VAR_X : VAR_N + 1, :].lerp_(theirs[..., VAR_X : VAR_N + 1, :], weight)
    mine[..., VAR_X : COV_XN + 1, :].addcmul_(spread, delta[..., :1, :])
    mine[..., VAR_N, :].addcmul_(spread[..., 1, :], delta[..., 1, :])
    mine[..., REST_X : REST_N + 1, :].addcmul_(delta, weight)
    for row, extreme in ((MAX, torch.maximum), (MIN, torch.minimum)):
        merged = extreme(mine[..., row, :], theirs[..., row, :])
        merged = torch.where(first[..., 0], theirs[..., row, :], merged)
        mine[..., row, :] = torch.where((new.seen == 0)[..., None], mine[..., row, :], merged)
    into.token[..., :STD_MIN].lerp_(new.token[..., :STD_MIN], weight[..., 0])
    for rows, extreme in ((slice(STD_MIN, STD_MAX), torch.minimum), (slice(STD_MAX, None), torch.maximum)):
        into.token[..., rows] = extreme(into.token[..., rows], new.token[..., rows])
    into.seen.copy_(total)


def merge_splits(parts: RawMoments) -> RawMoments:
    """One account for each layer, ``seen [L]``, from the accounts of its splits, ``seen [L, S]``."""
    layers, splits, _, channels = parts.channel.shape
    whole = empty_moments(layers, channels, parts.seen.device)
    whole = RawMoments(whole.seen, whole.channel.to(parts.channel.dtype), whole.token.to(parts.token.dtype))
    for split in range(splits):
        merge_moments_(whole, RawMoments(*(part[:, split] for part in parts)))
    return whole


def token_mean_var(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every token over its channels: ``rows [R, C] -> [R], [R]``.

    >>> token_mean_var(torch.tensor([[1.0, 3.0]]))
    (tensor([2.]), tensor([1.]))
    """
    mean = rows.mean(-1)
    mean = mean + (rows - mean[:, None]).mean(-1)  # what rounding left of a mean far from 0
    return mean, (rows - mean[:, None]).square().mean(-1)


def normalize_tokens(rows: Tensor, kind: Kind, eps: float) -> Tensor:
    r"""What LayerNorm or RMSNorm makes of ``rows [R, C]``, without gain and bias.

    .. math:: \mathrm{layer}: (x - m) / \sqrt{v + \epsilon},\qquad
              \mathrm{rms}: x / \sqrt{\overline{x^2} + \epsilon}
    """
    mean, var = token_mean_var(rows)
    if kind == "layer":
        deviation = rows - mean[:, None]
        deviation = deviation - deviation.mean(-1, keepdim=True)  # a mean of 1e4 is known to 5e-4 only
        return deviation * torch.rsqrt(var + eps)[:, None]
    return rows * torch.rsqrt(var + mean.square() + eps)[:, None]


def channel_moments(rows: Tensor, normalized: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Count and per-channel moments of the valid rows.

    Args:
        rows: ``[R, C]``, float32 or float64.
        normalized: ``[R, C]``, what the norm makes of them before gain and bias; None leaves its rows at 0.
        valid: ``[R]`` bool; None: all are.

    Returns:
        ``count`` (int64 scalar) and ``channel [9, C]``, see `RawMoments`.
    """
    keep = rows.new_ones(rows.shape[0], dtype=torch.bool) if valid is None else valid
    count = keep.sum()
    size = count.clamp(min=1)

    def only_valid(t: Tensor) -> Tensor:  # not a product: padding may hold NaN, and 0 * NaN is NaN
        return torch.where(keep[:, None], t, 0)

    def deviations(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift = only_valid(t).sum(0) / size
        rest = only_valid(t - shift).sum(0) / size
        return shift, rest, only_valid(t - shift - rest)

    shift_x, rest_x, dx = deviations(rows)
    zeros = torch.zeros_like(shift_x)
    shift_n, rest_n, dn = (zeros, zeros, torch.zeros_like(dx)) if normalized is None else deviations(normalized)
    spread = [(a * b).sum(0) / size for a, b in ((dx, dx), (dx, dn), (dn, dn))]
    most = torch.where(keep[:, None], rows, -torch.inf).amax(0)
    least = torch.where(keep[:, None], rows, torch.inf).amin(0)
    return count, torch.stack([shift_x, shift_n, rest_x, rest_n, *spread, most, least])


def token_summary(mean: Tensor, std: Tensor, eps_share: Tensor, valid: Tensor | None) -> Tensor:
    """The row ``[7]`` of `RawMoments.token` from per-token mean and standard deviation ``[R]``."""
    if valid is None:
        least = [std.amin(), mean.amin()]
        most = [std.amax(), mean.amax()]
        return torch.stack([std.mean(), mean.mean(), eps_share, *least, *most])
    size = valid.sum().clamp(min=1)
    means = [torch.where(valid, t, 0).sum() / size for t in (std, mean)]
    least = [torch.where(valid, t, torch.inf).amin() for t in (std, mean)]
    most = [torch.where(valid, t, -torch.inf).amax() for t in (std, mean)]
    return torch.stack([*means, eps_share, *least, *most])


def share_below(variances: Tensor, bound: float, valid: Tensor | None) -> Tensor:
    """Share of ``variances [R]`` below ``bound``, among the valid ones."""
    below = (variances < bound).to(torch.float32)
    if valid is None:
        return below.mean()
    return torch.where(valid, below, 0).sum() / valid.sum().clamp(min=1)


def normalize_groups(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """What GroupNorm makes of ``x [B, C, ...]``, without gain and bias, and the variances ``[B, G]`` it divides by.

    InstanceNorm is the case ``groups == C``.
    """
    grouped = x.reshape(x.shape[0], groups, -1)
    deviation = grouped - grouped.mean(-1, keepdim=True)
    deviation = deviation - deviation.mean(-1, keepdim=True)  # what rounding left of a mean far from 0
    var = deviation.square().mean(-1, keepdim=True)
    return (deviation * torch.rsqrt(var + eps)).reshape(x.shape), var.squeeze(-1)


def raw_moments(
    rows: Tensor,
    kind: Kind,
    eps: float,
    *,
    normalized: Tensor | None = None,
    divided_by: Tensor | None = None,
    valid: Tensor | None = None,
) -> RawMoments:
    """Everything one forward of a norm adds to its account: the meaning of `stabnorm.ops.moments`.

    Args:
        rows: the norm's input as ``[R, C]``, R >= 1, float32 or float64.
        kind: what the layer is; "layer" and "rms" are normalised here, a "group" or "instance" norm brings its own.
        eps: the layer's epsilon.
        normalized: ``[R, C]``, see `normalize_groups`; None for a "batch" norm, which is affine in every channel.
        divided_by: the variances a "group" or "instance" norm divides by, any shape.
        valid: ``[R]`` bool; None: all are.
    """
    mean, var = token_mean_var(rows)
    if kind in ("layer", "rms"):
        normalized = normalize_tokens(rows, kind, eps)
        divided_by = var + mean.square() if kind == "rms" else var
        share = share_below(divided_by, 10 * eps, valid)
    else:
        share = rows.new_zeros(()) if divided_by is None else share_below(divided_by.flatten(), 10 * eps, None)
    count, channel = channel_moments(rows, normalized, valid)
    return RawMoments(count, channel, token_summary(mean, var.sqrt(), share, valid))
