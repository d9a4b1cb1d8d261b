"""A user's LayerNorm or RMSNorm and the moments of its input, computed in one pass over the input.

The formulas are `functional.normalize_tokens`, with gain and bias, and `functional.raw_moments`. Output and gradients
equal torch's up to rounding, but not bit for bit. Therefore this only runs with `StabilityMonitor(fused=True)`, and
only in eager mode. A recomputed forward gives the same bits again, and adds no moments.
"""

import math
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from stabnorm import functional
from stabnorm.functional import RawMoments
from stabnorm.norms.rows import as_rows
from stabnorm.ops.dispatch import REFERENCE, op
from stabnorm.ops.moments import is_counted
from stabnorm.ops.rows import LOW_PRECISION, widened

NormKind = Literal["layer", "rms"]


class Spec(NamedTuple):
    """The norm, and which moments of its input are computed."""

    kind: NormKind
    shape: tuple[int, ...]  # shape of the last axes, which are normalised together
    eps: float
    tokens: bool
    normalized: bool


@op("rows")
def norm_with_moments(
    rows: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    spec: Spec,
    y: Tensor,
    into: RawMoments,
    valid: Tensor | None,
    add: bool,
) -> tuple[Tensor, Tensor]:
    """Write the norm of ``rows [R, C]`` into ``y``; with `add`, also add its moments to the accumulator.

    Returns:
        Mean and 1 / std of each token, ``[R]``, for `norm_gradient`.
    """
    wide = widened(rows)
    mean, var = functional.token_mean_var(wide)
    normalized = functional.normalize_tokens(wide, spec.kind, spec.eps)
    out = normalized if gain is None else normalized * gain
    y.copy_(out if bias is None else out + bias)
    if add:
        functional.merge_moments_(into, functional.raw_moments(wide, spec.kind, spec.eps, valid=valid))
    return mean, torch.rsqrt((var + mean.square() if spec.kind == "rms" else var) + spec.eps)


@op("rows")
def norm_gradient(
    dy: Tensor, rows: Tensor, gain: Tensor | None, means: Tensor, rstds: Tensor, kind: NormKind
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Dx of `norm_with_moments`, and the sums over rows of dy n and of dy, which are the gradients of gain and bias.

    .. math:: dx = r (g - \overline{g} - n\,\overline{g n}),\quad g = \mathrm{gain}\,dy

    without the mean of g for RMSNorm.
    """
    wide, upstream = widened(rows), widened(dy)
    normalized = (wide if kind == "rms" else wide - means[:, None]) * rstds[:, None]
    g = upstream if gain is None else upstream * gain
    dx = g - normalized * (g * normalized).mean(-1, keepdim=True)
    if kind == "layer":
        dx = dx - g.mean(-1, keepdim=True)
    return (dx * rstds[:, None]).to(rows.dtype), (upstream * normalized).sum(0), upstream.sum(0)


def splits_for(channels: int, device: torch.device) -> int:
    """In how many splits a kernel of this op wants an accumulator; 0: in none."""
    if norm_with_moments.chosen(torch.empty(1, device=device)) != "triton":
        return 0
    from stabnorm.ops.triton.shared import WIDEST_WITH_MOMENTS, splits_of_rows

    return splits_of_rows(device.type, device.index) if channels <= WIDEST_WITH_MOMENTS else 0


def backend_for(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Spec, into: RawMoments) -> str | None:
    """Return the backend that can compute both here; None if there is none, or if torch must handle this call."""
    backend = norm_with_moments.chosen(x)
    if backend == REFERENCE:
        return None
    if x.dtype in LOW_PRECISION and torch.is_autocast_enabled(x.device.type):  # the output may be of another dtype
        return None
    if x.shape[-len(spec.shape) :] != spec.shape or forward_ad._current_level >= 0:
        return None
    for t in (weight, bias):
        if t is not None and (t.shape != spec.shape or t.dtype != x.dtype or t.device != x.device):
            return None
    if backend == "triton":
        from stabnorm.ops.triton.shared import WIDEST_WITH_MOMENTS

        return backend if math.prod(spec.shape) <= WIDEST_WITH_MOMENTS and into.seen.ndim == 1 else None
    return backend if into.seen.ndim == 0 else None


def observed_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: Spec,
    valid: Tensor | None,
    into: RawMoments,
    backend: str,
) -> Tensor:
    """Return the norm of ``x``, and add its moments to ``into`` as `ops.moments.accumulate_moments_` does.

    Args:
        x: the input, whose last axes have the shape ``spec.shape``.
        weight: gain, of shape ``spec.shape``, or None.
        bias: bias, of the same shape, or None.
        spec: what is computed.
        valid: bool, one for each token, True = valid; None means that all are valid.
        into: one layer's accumulator, plain or in `splits_for` splits.
        backend: from `backend_for`, or "reference".
    """
    return _Observed.apply(x, weight, bias, spec, valid, into, backend)  # type: ignore[no-any-return, no-untyped-call]


class _Observed(torch.autograd.Function):
    """`observed_norm` on a given backend; second derivatives go through torch's own norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        spec: Spec,
        valid: Tensor | None,
        into: RawMoments,
        backend: str,
    ) -> Tensor:
        rows = as_rows(x, -1, len(spec.shape))
        gain, offset = (None if t is None else t.reshape(-1) for t in (weight, bias))
        keep = None if valid is None else valid.reshape(-1)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # the output must not be a view
        means, rstds = norm_with_moments.on(backend)(
            rows, gain, offset, spec, y.view(rows.shape), into, keep, is_counted()
        )
        ctx.save_for_backward(x, weight, bias, means, rstds)
        ctx.spec, ctx.backend = spec, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, means, rstds = ctx.saved_tensors
        spec: Spec = ctx.spec
        if torch.is_grad_enabled() or _is_batch_of_gradients(dy):  # with create_graph=True; in a vectorised Jacobian
            return (*_through_torch(spec, x, weight, bias, dy, ctx.needs_input_grad[:3]), *[None] * 4)
        rows, upstream = (as_rows(t, -1, len(spec.shape)) for t in (x, dy))
        gain = None if weight is None else weight.reshape(-1)
        dx, through, plain = norm_gradient.on(ctx.backend)(upstream, rows, gain, means, rstds, spec.kind)
        of_weight = None if weight is None else through.to(weight.dtype).view(weight.shape)
        of_bias = None if bias is None else plain.to(bias.dtype).view(bias.shape)
        return dx.view(x.shape), of_weight, of_bias, None, None, None, None


def _is_batch_of_gradients(dy: Tensor) -> bool:
    """Whether this is a batch of tensors that vmap made, which has no memory of its own."""
    functorch = torch._C._functorch
    return functorch.maybe_current_level() is not None or functorch.is_legacy_batchedtensor(dy)


def _through_torch(
    spec: Spec, x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return the gradients computed by torch's own norm, with a graph if gradients are recorded."""
    with_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [None if t is None else t.view_as(t) for t in (x, weight, bias)]  # they may have hooks
        gain, offset = inputs[1:]
        shape = list(spec.shape)
        if spec.kind == "layer":
            y = F.layer_norm(cast(Tensor, inputs[0]), shape, gain, offset, spec.eps)
        else:
            y = F.rms_norm(cast(Tensor, inputs[0]), shape, gain, spec.eps)
        wanted = [t for t, needs in zip(inputs, needed, strict=True) if t is not None and needs]
        gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=with_graph))
    return [next(gradients) if t is not None and needs else None for t, needs in zip(inputs, needed, strict=True)]
