"""PowerNorm in one pass over the input, where a kernel can save the second pass; see `stabnorm.ops.one_pass`."""

from typing import Any

import torch
from torch import Tensor

from stabnorm.functional import channel_affine
from stabnorm.nn._normalize import refuse_second_derivative
from stabnorm.ops.one_pass import affine_with_square, gradient_with_sums, redo_affine_, redo_gradient_, worth_a_guess
from stabnorm.ops.running import quadratic_gradient_, track_quadratic_


class OnePass(torch.autograd.Function):
    """PowerNorm's forward and backward in training; `_channel_norm` and `ops.running` have the formulas.

    The pass begins with a guess of the divisor: the running statistic before the batch, which the main phase uses. The
    guess is wrong in the warm-up, and in a recomputed forward, because the batch has already changed the statistic.
    Then the output is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        valid: Tensor | None,
        running: Tensor,
        recent: Tensor,
        step: Tensor,
        skips: Tensor,
        progress: Tensor,
        nu: Tensor,
        loss_scale: Tensor,
        warmup: int,
        alphas: tuple[float, float],
        eps: float,
        counting: bool,
    ) -> Tensor:
        guess, ctx.guess = torch.rsqrt(running + eps), worth_a_guess(rows, step, warmup)
        y, moments = affine_with_square(rows, valid, *channel_affine(weight, bias, None, None, guess), ctx.guess)
        divisor, gate = track_quadratic_(
            moments.square, moments.rows, running, recent, step, skips, progress, warmup, alphas[0], counting
        )
        rstd = torch.rsqrt(divisor + eps)
        scale, shift = channel_affine(weight, bias, None, None, rstd)
        redo_affine_(y, (rstd == guess).all() & ctx.guess, rows, scale, shift)
        ctx.save_for_backward(rows, weight, rstd, moments.rows, valid, scale, gate, moments.square * rstd * rstd)
        ctx.nu, ctx.loss_scale, ctx.alpha = nu, loss_scale, alphas[1]  # other batches change these buffers
        ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        rows, weight, rstd, count, valid, scale, gate, power = ctx.saved_tensors
        guess = ctx.nu * ctx.loss_scale
        dx, sums = gradient_with_sums(dy, rows, valid, scale, guess * rstd * rstd, ctx.guess)
        plain, weighted, _, weighted_valid = sums
        exact = weight.to(scale.dtype) * weighted_valid * rstd / count.clamp(min=1)
        psi = quadratic_gradient_(exact / ctx.loss_scale, power, gate, ctx.nu, ctx.alpha) * ctx.loss_scale
        redo_gradient_(dx, (psi == guess).all() & ctx.guess, dy, rows, valid, scale, psi * rstd * rstd)
        return dx, (weighted * rstd).to(weight.dtype), plain.to(ctx.bias_dtype), *[None] * 12
