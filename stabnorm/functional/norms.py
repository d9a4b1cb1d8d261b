"""The formulas of the norms that are affine in eval: y = (x - mean) rstd weight + eta x + bias, per channel.

Shape legend as in `stabnorm.functional.moments`: R rows (tokens), C channels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stabnorm.functional.moments import normalize_tokens, token_mean_var

ABSOLUTE_TO_STD = math.sqrt(math.pi / 2)  # standard deviation over mean absolute deviation of a Gaussian


class BatchMoments(NamedTuple):
    """Statistics of one batch that a batch norm uses.

    Attributes:
        rows: number of valid rows, scalar, in the moments' dtype.
        mean: ``[C]``; None if the norm does not centre.
        square: ``[C]``, mean square of the deviation from `mean`, or of x if there is no mean; biased.
        signs: ``[C]``, mean sign of the deviation if `square` comes from `absolute_moments`; else None.
    """

    rows: Tensor
    mean: Tensor | None
    square: Tensor
    signs: Tensor | None = None


def batch_moments(rows: Tensor, valid: Tensor | None, *, center: bool) -> BatchMoments:
    """Return the per-channel moments of the valid rows of ``[R, C]``, float32 or float64; 0 if no row is valid.

    >>> batch_moments(torch.tensor([[1.0], [3.0]]), None, center=True).square
    tensor([1.])
    """
    count = rows.new_full((), rows.shape[0]) if valid is None else valid.sum().to(rows.dtype)
    size = count.clamp(min=1)
    mean = None
    if valid is not None:
        rows = torch.where(valid[:, None], rows, 0)  # not a product: padding may hold NaN, and 0 * NaN is NaN
    if center:
        mean = rows.sum(0) / size
        rows = rows - mean if valid is None else torch.where(valid[:, None], rows - mean, 0)
    return BatchMoments(count, mean, (rows * rows).sum(0) / size)


def absolute_sums(deviations: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums over the valid rows of ``|deviations|`` and of their signs, each ``[C]``.

    >>> absolute_sums(torch.tensor([[-1.0], [2.0], [3.0]]), None)
    (tensor([6.]), tensor([1.]))
    """
    if valid is not None:
        deviations = torch.where(valid[:, None], deviations, 0)
    return deviations.abs().sum(0), deviations.sign().sum(0)


def absolute_moments(moments: BatchMoments, absolute: Tensor, signs: Tensor) -> BatchMoments:
    r"""Replace the standard deviation by the mean absolute deviation d (L1 batch norm, arXiv:1802.09769).

    .. math:: \sigma = c\, d,\quad d = \frac1n \sum_i |x_i - \mu|,\quad c = \sqrt{\pi / 2},\qquad
              \frac{\partial \sigma^2}{\partial x_i} = \frac2n\, c\, \sigma (s_i - \bar s),\quad
              s_i = \mathrm{sign}(x_i - \mu)

    With the factor c, sigma is the standard deviation of Gaussian data. If there is no mean, d is the mean of abs(x),
    and no mean is subtracted from s.

    Args:
        moments: moments of the batch.
        absolute: ``[C]``, from `absolute_sums` of the deviations from the batch's mean.
        signs: ``[C]``, from the same call.
    """
    size = moments.rows.clamp(min=1)
    square = (ABSOLUTE_TO_STD * absolute / size).square()
    return BatchMoments(moments.rows, moments.mean, square, signs / size)  # torch 2.6 does not trace `_replace`


def merge_batches(counts: Tensor, means: Tensor | None, squares: Tensor) -> BatchMoments:
    """Merge the moments of W batches, ``[W]`` and ``[W, C]``, to those of one large batch, by Chan's rule."""
    count = counts.sum()
    share = (counts / count.clamp(min=1))[:, None]
    if means is None:
        return BatchMoments(count, None, (share * squares).sum(0))
    mean = (share * means).sum(0)
    return BatchMoments(count, mean, (share * (squares + (means - mean).square())).sum(0))


def channel_affine(
    weight: Tensor, bias: Tensor | None, eta: Tensor | None, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    r"""Return ``scale`` and ``shift`` ``[C]`` with y = scale x + shift; RepBN's lemma (arXiv:2405.11582, eq. 4).

    .. math:: \mathrm{scale} = \gamma / \sigma + \eta,\quad \mathrm{shift} = \beta - \gamma \mu / \sigma,\quad
              \sigma = \sqrt{v + \epsilon}
    """
    gain = weight.to(rstd.dtype) * rstd
    shift = None if bias is None else bias.to(rstd.dtype)
    if mean is not None:
        centred = -mean * gain
        shift = centred if shift is None else shift + centred
    return gain if eta is None else gain + eta.to(rstd.dtype), shift


def scale_groups(rows: Tensor, groups: int, eps: float) -> Tensor:
    """Divide every group of a token's channels by its rms (GroupScaling of PowerNorm's published code).

    >>> scale_groups(torch.tensor([[3.0, 3.0, 0.1, 0.1]]), 2, 0.0)
    tensor([[1., 1., 1., 1.]])
    """
    grouped: Tensor = rows.unflatten(-1, (groups, -1))
    return (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2)


def geometric_mean(window: Tensor) -> Tensor:
    """Return the geometric mean over the first axis: ``[M, C] -> [C]``; a dead channel gives almost 0, not log(0)."""
    return window.clamp(min=torch.finfo(window.dtype).tiny).log().mean(0).exp()


def is_burst(before: Tensor, after: Tensor, eps: float) -> Tensor:
    r"""Whether the batch that turned the window ``before [M, C]`` into ``after`` is an outlier; bool scalar.

    .. math:: \overline{(AM' - GM') / GM} > M\, \overline{\mathrm{Var}(\sqrt{s}) / GM} + 10^{-5}

    AM' and GM' belong to the new window, GM and Var to the old one, and the means are over channels. The published
    filter (arXiv:2208.01313, section 3.3) compares a window with its own variance, but AM - GM <= M Var always holds
    (Aldaz). Its code also pools Var over channels, so that it measures how much the channels differ. A second moment
    below eps counts as eps, because it does not matter to the norm. A gap of 1e-5 does not matter either: it is that of
    one batch in four that differs by one percent, and rounding reaches it if batches repeat and the variance is 0.
    """
    before, after = before.clamp(min=eps), after.clamp(min=eps)
    scale = geometric_mean(before)
    gap = after.mean(0) - geometric_mean(after)
    roots = before.sqrt()
    spread = (roots - roots.mean(0)).square().mean(0)
    return (gap / scale).mean() > before.shape[0] * (spread / scale).mean() + 1e-5


def upstream_sums(dy: Tensor, deviations: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sums over rows of ``dy`` and ``dy * deviations``, over all rows and over the valid ones; each ``[C]``.

    Padding with an upstream gradient of 0 adds 0, whatever value it has.
    """
    product = dy * deviations
    if valid is None:
        plain, weighted = dy.sum(0), product.sum(0)
        return plain, weighted, plain, weighted
    keep = valid[:, None]
    product = torch.where(dy == 0, 0, product)
    return dy.sum(0), product.sum(0), torch.where(keep, dy, 0).sum(0), torch.where(keep, product, 0).sum(0)


def input_gradient(
    dy: Tensor, deviations: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor, offset: Tensor | None
) -> Tensor:
    r"""Return dx of y = scale x + shift whose scale and shift depend on the batch, ``[R, C]``.

    .. math:: dx = \mathrm{scale}\, dy - [\mathrm{valid}] (\mathrm{slope}\,(x - \mu) + \mathrm{offset})

    slope = psi / sigma^2 and offset = mean(dz) / sigma. The gradient is exact if psi = mean(dz z).
    """
    dx = dy * scale
    if valid is None:
        dx = torch.addcmul(dx, deviations, slope, value=-1)
        return dx if offset is None else dx - offset
    through = deviations * slope
    if offset is not None:
        through = through + offset
    return torch.where(valid[:, None], dx - through, dx)


def blend(lam: Tensor, norm: Tensor, rep: Tensor) -> Tensor:
    """Return ``lam norm + (1 - lam) rep`` for a scalar tensor lam; at 1 and 0 exactly one of them, bit for bit.

    >>> blend(torch.tensor(0.0), torch.full((2,), torch.nan), torch.ones(2))
    tensor([1., 1.])
    """
    both = norm * lam + rep * (1 - lam)
    return torch.where(lam == 1, norm, torch.where(lam == 0, rep, both))


def join_gradients(lam: Tensor, of_norm: Tensor, of_rep: Tensor) -> Tensor:
    """Return the sum of the gradients of two branches; a branch of weight 0 is left out.

    It is not multiplied by 0, because its gradient may be NaN. Adding +0 would change a -0 of the other branch.
    """
    return torch.where(lam == 1, of_norm, torch.where(lam == 0, of_rep, of_norm + of_rep))


def blended_norm(
    lam: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Compute PRepBN's blend of LayerNorm and an affine map (arXiv:2405.11582, eq. 3).

    .. math:: y = \lambda (w n + b) + (1 - \lambda) (\mathrm{scale}\, x + \mathrm{shift}),\quad n = (x - m) r

    Also return the mean m and 1 / std r of each token.
    """
    mean, var = token_mean_var(rows)
    norm = normalize_tokens(rows, "layer", eps)
    norm = norm if weight is None else norm * weight
    rep = rows * scale
    y = blend(lam, norm if bias is None else norm + bias, rep if shift is None else rep + shift)
    return y, mean, torch.rsqrt(var + eps)


def blended_gradient(
    lam: Tensor, dy: Tensor, normalized: Tensor, token_rstd: Tensor, weight: Tensor | None, of_rep: Tensor
) -> Tensor:
    r"""Return dx of `blended_norm`; ``of_rep`` is the `input_gradient` of its affine map, without the factor 1 - lam.

    .. math:: dx = \lambda r (g - \overline{g} - n\,\overline{g n}) + (1 - \lambda)\,\mathrm{of\_rep},\quad g = w\,dy
    """
    g = dy if weight is None else dy * weight
    along = normalized * (g * normalized).mean(-1, keepdim=True)
    return blend(lam, (g - g.mean(-1, keepdim=True) - along) * token_rstd[:, None], of_rep)
