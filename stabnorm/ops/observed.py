"""A user's LayerNorm or RMSNorm and the moments of its input in one pass, instead of one for each.

The formula is two: `functional.normalize_tokens`, with gain and bias, and `functional.raw_moments`. Output and
gradients are torch's to rounding, not to the bit, so this runs only where that was asked for: `StabilityMonitor(
fused=True)`. A recomputed forward gives the same bits again, and counts nothing. Eager mode only.
"""

import math
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from stabnorm.functional import RawMoments
from stabnorm.norms.rows import as_rows
from stabnorm.ops.dispatch import execution
from stabnorm.ops.moments import is_recompute
from stabnorm.ops.rows import LOW_PRECISION

OP = "observed_norm"
NormKind = Literal["layer", "rms"]


class Spec(NamedTuple):
    """What is computed: the norm, and which of its input's moments."""

    kind: NormKind
    shape: tuple[int, ...]  # what is normalised together
    eps: float
    tokens: bool
    normalized: bool


def splits_for(channels: int, device: torch.device) -> int:
    """In how many splits a kernel of this op wants an account; 0: in none."""
    if execution(OP, torch.empty(1, device=device)) != "triton":
        return 0
    from stabnorm.ops.triton import observed as _triton_observed

    return _triton_observed.splits_of(device.type, device.index) if channels <= _triton_observed.WIDEST else 0


def body_for(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Spec, into: RawMoments) -> str | None:
    """The execution that can do both at once here; None: none can, or torch would do something of its own."""
    if x.dtype in LOW_PRECISION and torch.is_autocast_enabled(x.device.type):  # the output may be of another dtype
        return None
    if x.shape[-len(spec.shape) :] != spec.shape or forward_ad._current_level >= 0:
        return None
    for t in (weight, bias):
        if t is not None and (t.shape != spec.shape or t.dtype != x.dtype or t.device != x.device):
            return None
    body = execution(OP, x)
    if body == "triton":
        from stabnorm.ops.triton.observed import WIDEST

        return body if math.prod(spec.shape) <= WIDEST and into.seen.ndim == 1 else None
    return body if body == "cpp" and into.seen.ndim == 0 else None


def observed_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: Spec,
    valid: Tensor | None,
    into: RawMoments,
    body: str,
) -> Tensor:
    """The norm of ``x``, its moments added to ``into`` as `ops.moments.accumulate_moments_` would.

    Args:
        x: ends with the axes ``spec.shape``.
        weight: gain, ``spec.shape``, or none.
        bias: the same.
        spec: what is computed.
        valid: bool, one for each token, True = counts; None: all do.
        into: one layer's account, plain or in `splits_for` splits.
        body: from `body_for`.
    """
    return _Observed.apply(x, weight, bias, spec, valid, into, body)  # type: ignore[no-any-return, no-untyped-call]


class _Observed(torch.autograd.Function):
    """`observed_norm` on a given body; once more differentiable through torch's own norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        spec: Spec,
        valid: Tensor | None,
        into: RawMoments,
        body: str,
    ) -> Tensor:
        rows = as_rows(x, -1, len(spec.shape))
        gain, offset = (None if t is None else t.reshape(-1) for t in (weight, bias))
        keep, add = None if valid is None else valid.reshape(-1), not is_recompute()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # what is returned must be no view
        if body == "triton":
            from stabnorm.ops.triton import observed as _triton_observed

            means, rstds = _triton_observed.norm(
                rows, gain, offset, spec.eps, spec.kind == "rms", y.view(rows.shape), into, keep, spec.tokens,
                spec.normalized, add,
            )  # fmt: skip
        else:
            from stabnorm.ops.cpp import observed as _cpp_observed

            out = y.view(rows.shape)
            means, rstds = _cpp_observed.norm(rows, gain, offset, spec.eps, spec.kind, out, into, keep, add)
        ctx.save_for_backward(x, weight, bias, means, rstds)
        ctx.spec, ctx.body = spec, body
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, means, rstds = ctx.saved_tensors
        spec: Spec = ctx.spec
        if torch.is_grad_enabled() or _is_batch_of_gradients(dy):  # with create_graph=True; in a vectorised Jacobian
            return (*_through_torch(spec, x, weight, bias, dy, ctx.needs_input_grad[:3]), *[None] * 4)
        rows, upstream = (as_rows(t, -1, len(spec.shape)) for t in (x, dy))
        gain = None if weight is None else weight.reshape(-1)
        if ctx.body == "triton":
            from stabnorm.ops.triton import observed as _triton_observed

            dx, through, plain = _triton_observed.gradient(upstream, rows, gain, means, rstds, spec.kind == "rms")
        else:
            from stabnorm.ops.cpp import observed as _cpp_observed

            dx, through, plain = _cpp_observed.gradient(upstream, rows, gain, means, rstds, spec.kind)
        of_weight = None if weight is None else through.to(weight.dtype).view(weight.shape)
        of_bias = None if bias is None else plain.to(bias.dtype).view(bias.shape)
        return dx.view(x.shape), of_weight, of_bias, None, None, None, None


def _is_batch_of_gradients(dy: Tensor) -> bool:
    """Whether it stands for many tensors at once, and has no memory of its own."""
    functorch = torch._C._functorch
    return functorch.maybe_current_level() is not None or functorch.is_legacy_batchedtensor(dy)


def _through_torch(
    spec: Spec, x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients by torch's own norm, with a graph of their own if there is to be one."""
    with_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [None if t is None else t.view_as(t) for t in (x, weight, bias)]  # not themselves: they may have hooks
        gain, offset = inputs[1:]
        shape = list(spec.shape)
        if spec.kind == "layer":
            y = F.layer_norm(cast(Tensor, inputs[0]), shape, gain, offset, spec.eps)
        else:
            y = F.rms_norm(cast(Tensor, inputs[0]), shape, gain, spec.eps)
        wanted = [t for t, needs in zip(inputs, needed, strict=True) if t is not None and needs]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=with_graph))
    return [next(found) if t is not None and needs else None for t, needs in zip(inputs, needed, strict=True)]
