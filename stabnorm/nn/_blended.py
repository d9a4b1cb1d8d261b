"""The autograd functions of PRepBN: LayerNorm and RepBN computed together, or one after the other and then blended."""

from typing import Any

import torch
from torch import Tensor

from stabnorm._models.ranks import gather_over_ranks
from stabnorm.functional import channel_affine
from stabnorm.nn._normalize import refuse_second_derivative
from stabnorm.nn.rep import RepBN
from stabnorm.ops.blend import blend, join_gradients
from stabnorm.ops.blended import LayerNormArgs, TokenMoments, blended_gradient, blended_norm, blended_sums
from stabnorm.ops.rows import BatchMap


def blended(
    backend: str,
    lam: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rep: RepBN,
) -> Tensor:
    """Compute the blend ``[R, C]`` of LayerNorm and RepBN in training mode, and update the statistics of `rep`.

    Args:
        backend: which backend runs, see `stabnorm.ops.dispatch`.
        lam: the share of LayerNorm, ``[]``.
        rows: the input, ``[R, C]``.
        valid: which rows are valid, ``[R]`` bool or None for all.
        weight: weight of LayerNorm, ``[C]`` or None.
        bias: bias of LayerNorm, ``[C]`` or None.
        eps: eps of LayerNorm.
        rep: the RepBN.
    """
    moments, rstd = rep.gather(rows, valid)
    return _Blended.apply(  # type: ignore[no-any-return, no-untyped-call]
        backend, lam, rows, weight, bias, eps, rep.weight, rep.bias, rep.eta, moments.mean, rstd, moments.rows, valid,
        rep.sync,
    )  # fmt: skip


class _Blended(torch.autograd.Function):
    r"""y = lam (w n + b) + (1 - lam) (scale x + shift); n is the normalised token, scale and shift come from the batch.

    The parameters of a branch whose weight is 0 get a gradient of 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
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
        lam = lam.clone()  # the buffer may change between forward and backward
        scale, shift = channel_affine(gain, offset, eta, mean, rstd)
        y, token_mean, token_rstd = blended_norm.on(backend)(lam, rows, LayerNormArgs(weight, bias, eps), scale, shift)
        ctx.save_for_backward(
            lam, rows, weight, bias, gain, offset, eta, mean, rstd, count, valid, scale, token_mean, token_rstd
        )
        ctx.backend, ctx.eps, ctx.sync = backend, eps, sync
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        lam, rows, weight, bias, gain, offset, eta, mean, rstd, count, valid, scale, *rest = ctx.saved_tensors
        tokens = TokenMoments(*rest)
        sums = blended_sums.on(ctx.backend)(lam, dy, rows, mean, valid, tokens)
        plain_valid, weighted_valid = sums.plain_valid, sums.weighted_valid
        if ctx.sync:
            plain_valid, weighted_valid = gather_over_ranks(torch.cat([plain_valid, weighted_valid])).sum(0).chunk(2)
        size, wide_gain = count.clamp(min=1), gain.to(scale.dtype)
        slope = wide_gain * weighted_valid * rstd / size * rstd * rstd
        constant = None if mean is None else wide_gain * plain_valid * rstd / size
        own, of_rep = LayerNormArgs(weight, bias, ctx.eps), BatchMap(scale, slope, constant, mean)
        dx, of_weight, of_bias = blended_gradient.on(ctx.backend)(lam, dy, rows, valid, own, of_rep, tokens, sums)
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


def fork(lam: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Pass on the input for norm and for RepBN, and RepBN's parameters; stop the gradient of a branch of weight 0."""
    if _takes_gradients():
        return _Fork.apply(lam, x, *parameters)  # type: ignore[no-any-return, no-untyped-call]
    return x, x, *parameters  # Dynamo of torch 2.13 gives a forward a context here that it does not take


def blend_of(lam: Tensor, norm: Tensor, rep: Tensor) -> Tensor:
    """Blend the outputs of norm and RepBN in the norm's dtype, see `stabnorm.ops.blend`."""
    if _takes_gradients():
        return _Blend.apply(lam, norm, rep)  # type: ignore[no-any-return, no-untyped-call]
    return blend(lam, norm, rep.to(norm.dtype))


def _takes_gradients() -> bool:
    """Whether a backward may follow; not so while `torch.jit` traces, which writes a function twice in two ways."""
    return torch.is_grad_enabled() and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


class _Fork(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(lam: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return x.view_as(x), x.view_as(x), *(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0].clone())  # lam may change between forward and backward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (lam,) = ctx.saved_tensors
        of_norm, of_rep, *parameters = grads
        gated = (None if g is None else torch.where(lam == 1, 0, g) for g in parameters)
        if of_norm is None or of_rep is None:
            return None, of_rep if of_norm is None else of_norm, *gated
        return None, join_gradients(lam, of_norm, of_rep), *gated


class Idle(torch.autograd.Function):
    """Pass on y, and give unused parameters a gradient of 0, because DistributedDataParallel waits for each one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *map(torch.zeros_like, ctx.saved_tensors)


class _Blend(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(lam: Tensor, norm: Tensor, rep: Tensor) -> Tensor:
        return blend(lam, norm, rep.to(norm.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        lam, _, rep = inputs
        ctx.save_for_backward(lam.clone())
        ctx.rep_dtype = rep.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (lam,) = ctx.saved_tensors
        return None, grad * lam, (grad * (1 - lam)).to(ctx.rep_dtype)  # _Fork stops NaN * 0
