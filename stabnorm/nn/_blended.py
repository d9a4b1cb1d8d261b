"""Both norms of a PRepBN over LayerNorm at once: one autograd function over `stabnorm.ops.blended`."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stabnorm._models.ranks import gather_over_ranks
from stabnorm.functional import channel_affine
from stabnorm.nn._channel_norm import refuse_second_derivative
from stabnorm.ops.blended import blended_gradient, blended_norm, blended_sums

if TYPE_CHECKING:
    from stabnorm.nn.prep import PRepBN


def blended(body: str, norm: "PRepBN", rows: Tensor, valid: Tensor | None) -> Tensor:
    """What `norm` makes of ``rows [R, C]`` in training; its `rep` gathers statistics."""
    rep = norm.rep
    moments, rstd = rep.gather(rows, valid)
    return _Blended.apply(  # type: ignore[no-any-return, no-untyped-call]
        body, norm.lam, rows, norm.weight, norm.bias, norm.eps, rep.weight, rep.bias, rep.eta, moments.mean, rstd,
        moments.rows, valid, rep.sync,
    )  # fmt: skip


class _Blended(torch.autograd.Function):
    r"""y = lam (w n + b) + (1 - lam) (scale x + shift), n from each token and scale, shift from the batch.

    A parameter of a branch of weight 0 gets a gradient of 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        body: str,
        lam: Tensor,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        gain: Tensor,
        offset: Tensor | None,
        eta: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        count: Tensor,
        valid: Tensor | None,
        sync: bool,
    ) -> Tensor:
        lam = lam.clone()  # it moves between forward and backward
        scale, shift = channel_affine(gain, offset, eta, mean, rstd)
        y, token_mean, token_rstd = blended_norm(body, lam, rows, weight, bias, eps, scale, shift)
        ctx.save_for_backward(
            lam, rows, weight, bias, gain, offset, eta, mean, rstd, count, valid, scale, token_mean, token_rstd
        )
        ctx.body, ctx.sync = body, sync
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        lam, rows, weight, bias, gain, offset, eta, mean, rstd, count, valid, scale, *tokens = ctx.saved_tensors
        sums = blended_sums(ctx.body, lam, dy, rows, mean, valid, *tokens)
        plain_valid, weighted_valid = sums.plain_valid, sums.weighted_valid
        if ctx.sync:
            plain_valid, weighted_valid = gather_over_ranks(torch.cat([plain_valid, weighted_valid])).sum(0).chunk(2)
        size, wide_gain = count.clamp(min=1), gain.to(scale.dtype)
        slope = wide_gain * weighted_valid * rstd / size * rstd * rstd
        constant = None if mean is None else wide_gain * plain_valid * rstd / size
        dx, of_weight, of_bias = blended_gradient(
            ctx.body, lam, dy, rows, weight, bias, scale, mean, valid, slope, constant, tokens[0], tokens[1], sums
        )
        rep = 1 - lam

        def of(sum_: Tensor, parameter: Tensor) -> Tensor:
            return torch.where(rep == 0, 0, rep * sum_).to(parameter.dtype)

        through = sums.weighted if mean is None else sums.weighted + mean * sums.plain
        return (
            None, None, dx,
            None if weight is None else of_weight.to(weight.dtype),
            None if bias is None else of_bias.to(bias.dtype),
            None,
            of(sums.weighted * rstd, gain),
            None if offset is None else of(sums.plain, offset),
            of(through.sum().reshape(eta.shape), eta),
            *[None] * 5,
        )  # fmt: skip
