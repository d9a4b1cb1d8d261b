"""The formulas of the raw moments, which every hook gathers: their layout, and what one forward adds to it.

Shape legend: R rows (tokens), C channels. *Per channel* means over the rows (what BatchNorm sees), *per token* means
over the channels (what LayerNorm sees). Nothing here computes a variance as E[x^2] - E[x]^2: at a mean of 1e4 and a
standard deviation of 1 that leaves no digit in float32.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stabnorm.functional.accumulators import Field, Layout, Rows

Kind = Literal["layer", "rms", "batch", "group", "instance"]


class RawMoments(NamedTuple):
    """What one forward adds to a layer's accumulator; two of them merge exactly (`merge_moments_`).

    Attributes:
        seen: number of valid tokens, int64 scalar.
        channel: per channel, ``[rows, C]``, see `RAW`; x is the norm's input, n what it normalises it to. Variances and
            the covariance are divided by the count.
        token: over tokens, ``[rows]``: means, least and largest of the tokens' standard deviations and means, and the
            share of the variances the norm divides by that lie below 10 eps.
    """

    seen: Tensor
    channel: Tensor
    token: Tensor


def _seen(moments: RawMoments) -> Tensor:
    return moments.seen


# The layout of the moments: the names here are the rows that every backend fills, in this order.
RAW = Layout(
    RawMoments,
    seen=Field((Rows("sum"),), dtype=torch.int64),
    channel=Field(
        (
            Rows("joint_moments", ("SHIFT_X", "SHIFT_N", "REST_X", "REST_N", "VAR_X", "COV_XN", "VAR_N")),
            Rows("seen_max", ("MAX",)),
            Rows("seen_min", ("MIN",)),
        ),
        per_channel=True,
        weighted_by=_seen,
    ),
    token=Field(
        (
            Rows("mean", ("STD_MEAN", "MEAN_MEAN", "EPS_SHARE")),
            Rows("min", ("STD_MIN", "MEAN_MIN"), empty=torch.inf),
            Rows("max", ("STD_MAX", "MEAN_MAX"), empty=-torch.inf),
        ),
        weighted_by=_seen,
    ),
)
SHIFT_X, SHIFT_N, REST_X, REST_N, VAR_X, COV_XN, VAR_N, MAX, MIN = range(9)
STD_MEAN, MEAN_MEAN, EPS_SHARE, STD_MIN, MEAN_MIN, STD_MAX, MEAN_MAX = range(7)
CHANNEL_ROWS, TOKEN_ROWS = len(RAW.fields["channel"].names), len(RAW.fields["token"].names)

empty_moments, clear_moments_, merge_moments_, merge_splits = RAW.empty, RAW.clear_, RAW.merge_, RAW.merged


def token_mean_var(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every token over its channels: ``rows [R, C] -> [R], [R]``.

    >>> token_mean_var(torch.tensor([[1.0, 3.0]]))
    (tensor([2.]), tensor([1.]))
    """
    mean = rows.mean(-1)
    mean = mean + (rows - mean[:, None]).mean(-1)  # the rounding error of a mean far from 0
    return mean, (rows - mean[:, None]).square().mean(-1)


def normalize_tokens(rows: Tensor, kind: Kind, eps: float) -> Tensor:
    r"""Normalise ``rows [R, C]`` as LayerNorm or RMSNorm does, without gain and bias.

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
    """Return the count and the per-channel moments of the valid rows.

    Args:
        rows: ``[R, C]``, float32 or float64.
        normalized: ``[R, C]``, the normalised rows before gain and bias; None leaves their moments at 0.
        valid: ``[R]`` bool; None means that all are valid.

    Returns:
        ``count`` (int64 scalar) and ``channel [rows, C]``, see `RawMoments`.
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
    """Return `RawMoments.token` from the mean and the standard deviation of each token, ``[R]``."""
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
    """Return the share of ``variances [R]`` below ``bound``, among the valid ones."""
    below = (variances < bound).to(torch.float32)
    if valid is None:
        return below.mean()
    return torch.where(valid, below, 0).sum() / valid.sum().clamp(min=1)


def normalize_groups(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise ``x [B, C, ...]`` as GroupNorm does, without gain and bias; also return the variances ``[B, G]``.

    InstanceNorm is the case ``groups == C``.
    """
    grouped = x.reshape(x.shape[0], groups, -1)
    deviation = grouped - grouped.mean(-1, keepdim=True)
    deviation = deviation - deviation.mean(-1, keepdim=True)  # the rounding error of a mean far from 0
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
    """Return all that one forward of a norm adds to its accumulator; `stabnorm.ops.moments` computes the same.

    Args:
        rows: the norm's input as ``[R, C]``, R >= 1, float32 or float64.
        kind: what the layer is. The input of "layer" and "rms" is normalised here.
        eps: the layer's epsilon.
        normalized: ``[R, C]``, the normalised input of a "group" or "instance" norm, see `normalize_groups`. Default:
            None, as for a "batch" norm, which is affine in every channel.
        divided_by: the variances that such a norm divides by, any shape. Default: None.
        valid: ``[R]`` bool. Default: None means that all are valid.
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


def explained_share(var_x: Tensor, cov: Tensor, var_y: Tensor, mean_y: Tensor, scale: Tensor | None = None) -> Tensor:
    r"""Return the share of y's variance that a map ``scale x + shift`` reproduces, per channel.

    1 minus this share is the affine residual.

    .. math:: \frac{\mathrm{cov}^2}{v_x v_y} \text{ for the best map},\qquad
              \frac{s\,(2\,\mathrm{cov} - s\,v_x)}{v_y} \text{ for the scale } s

    A y that does not vary is reproduced by a constant; an x that does not vary reproduces nothing.

    Args:
        var_x: variance of x, ``[C]``. All arguments have this shape, and may have leading axes.
        cov: covariance of x and y.
        var_y: variance of y; NaN gives NaN.
        mean_y: mean of y. A variance of y below 1e-12 of its square counts as 0.
        scale: scale of the map. Default: the best one.

    >>> explained_share(*(torch.tensor(value) for value in (1.0, 1.0, 2.0, 0.0)))
    tensor(0.5000)
    """
    constant = var_y <= 1e-12 * mean_y.square()
    if scale is None:
        power = var_x * var_y
        share = torch.where(power > 0, cov.square() / power.clamp(min=torch.finfo(power.dtype).tiny), power * 0)
    else:
        share = scale * (2 * cov - scale * var_x) / torch.where(constant, 1, var_y)
    return torch.where(constant, torch.where(var_y.isnan(), torch.nan, 1), share)
