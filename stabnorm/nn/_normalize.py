"""The autograd function that the norms of this package share.

In training each norm computes y = (x - mean) rstd weight + eta x + bias per channel. The norms differ in where `mean`
and `rstd` come from, and in what their backward uses for mean(dz z). The autograd function saves no buffer, so two
forwards before one backward, or a module that is used twice, work.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stabnorm._models.ranks import gather_over_ranks
from stabnorm.errors import StabNormError
from stabnorm.functional import BatchMoments, channel_affine
from stabnorm.ops.rows import BatchMap, affine_of_rows, gradient_through_moments, sums_of_rows
from stabnorm.ops.running import quadratic_gradient_, smooth_gradient_


def refuse_second_derivative() -> None:
    """Raise StabNormError in a backward with `create_graph=True`.

    The statistics are constants to these functions, and the state of the gradient changes, so a second derivative would
    be silently wrong. `once_differentiable` raises only if the upstream gradient requires a gradient itself.
    """
    if torch.is_grad_enabled():
        raise StabNormError(
            "the norms of stabnorm have no second derivative in training mode. Take the gradient without create_graph, "
            "or call eval() on them first"
        )


class Psi(NamedTuple):
    """What the backward uses for psi = mean(dz z).

    Attributes:
        rule: "exact" uses the batch's own psi, which is the gradient of a norm with the batch's own rstd. "smooth" uses
            UnifiedNorm's running average of the mean over a window. "quadratic" uses PowerNorm's running nu.
        decay: weight of the new value ("smooth"), or share of the old one ("quadratic").
        loss_scale: the factor by which the loss is scaled; the running statistics are in units of the unscaled loss of
            one process, so that they can be resumed on any number of ranks.
        gate: whether the batch enters the statistics, and whether they are used; from the forward.
        average: ``[C]``, the running statistic; a buffer.
        window: ``[M, C]``, the last M values ("smooth"); a buffer.
        filled: the number of values in the window ("smooth"); a buffer.
        power: ``[C]``, mean(z^2) of the batch ("quadratic").
    """

    rule: Literal["exact", "smooth", "quadratic"] = "exact"
    decay: float = 0.0
    loss_scale: Tensor | None = None
    gate: Tensor | None = None
    average: Tensor | None = None
    window: Tensor | None = None
    filled: Tensor | None = None
    power: Tensor | None = None


EXACT = Psi()


def normalize(
    rows: Tensor,
    valid: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eta: Tensor | None,
    moments: BatchMoments,
    rstd: Tensor,
    sync: bool,
    psi: Psi = EXACT,
) -> Tensor:
    """Normalise rows with the batch's (or substituted) statistics, ``[R, C]`` to the same, with the norm's gradient.

    Args:
        rows: ``[R, C]``.
        valid: ``[R]`` bool or None.
        weight: ``[C]``.
        bias: ``[C]`` or None.
        eta: ``[1]`` or None.
        moments: moments of the batch. If `mean` is None, x is not centred. `rows` is the count for means in the
            backward; `ops.rows.gradient_through_moments` says how the gradient depends on the rest.
        rstd: ``[C]``, the factor for x.
        sync: add up the sums of the backward over ranks.
        psi: what the backward uses for mean(dz z). Default: the exact gradient.
    """
    arguments = (rows, weight, bias, eta, rstd, valid, sync, *psi, *moments)
    return _Normalize.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


class _Normalize(torch.autograd.Function):
    r"""y = (x - mean) rstd weight + eta x + bias, with z = (x - mean) rstd and dz = weight dy.

    .. math:: dx = (dz - \psi z - \overline{dz})\, rstd + \eta\, dy

    The mean of dz is only subtracted if x is centred. With psi = mean(dz z) and the batch's own rstd, this is the exact
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eta: Tensor | None,
        rstd: Tensor,
        valid: Tensor | None,
        sync: bool,
        rule: str,
        decay: float,
        loss_scale: Tensor | None,
        gate: Tensor | None,
        average: Tensor | None,
        window: Tensor | None,
        filled: Tensor | None,
        power: Tensor | None,
        *moments: Any,
    ) -> Tensor:
        scale, shift = channel_affine(weight, bias, eta, BatchMoments(*moments).mean, rstd)
        ctx.save_for_backward(rows, weight, bias, eta, rstd, valid, scale, gate, power, *moments)
        ctx.loss_scale = loss_scale
        ctx.sync, ctx.rule, ctx.decay = sync, rule, decay
        ctx.average, ctx.window, ctx.filled = average, window, filled  # other batches change them: not saved
        return affine_of_rows(rows, scale, shift)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        rows, weight, bias, eta, rstd, valid, scale, gate, power, *saved = ctx.saved_tensors
        moments = BatchMoments(*saved)
        mean = moments.mean
        plain, weighted, plain_valid, weighted_valid = sums_of_rows(grad_y, rows, mean, valid)
        unit = ctx.loss_scale
        if ctx.sync:
            sums = gather_over_ranks(torch.cat([plain_valid, weighted_valid]))
            plain_valid, weighted_valid = sums.sum(0).chunk(2)
            # Each rank's loss is the mean over its share, so a token's gradient is that of one process times the ranks.
            unit = None if unit is None else unit * len(sums)
        size = moments.rows.clamp(min=1)
        gain = weight.to(scale.dtype)
        psi = gain * weighted_valid * rstd / size
        if ctx.rule == "smooth":
            psi = smooth_gradient_(psi / unit, gate, ctx.window, ctx.average, ctx.filled, ctx.decay) * unit
        elif ctx.rule == "quadratic":
            psi = quadratic_gradient_(psi / unit, power, gate, ctx.average, ctx.decay) * unit
        offset = None if mean is None else gain * plain_valid * rstd / size
        dx = gradient_through_moments(grad_y, rows, valid, BatchMap(scale, psi * rstd * rstd, offset, mean), moments)
        d_weight = (weighted * rstd).to(weight.dtype)
        d_bias = None if bias is None else plain.to(bias.dtype)
        d_eta = None
        if eta is not None:
            through = weighted if mean is None else weighted + mean * plain
            d_eta = through.sum().reshape(eta.shape).to(eta.dtype)
        return dx, d_weight, d_bias, d_eta, *[None] * (11 + len(moments))
