"""A user's LayerNorm or RMSNorm and the moments of its input in one pass, instead of one for each.

The formula is two: `functional.normalize_tokens`, with gain and bias, and `functional.raw_moments`. Output and
gradients are torch's to rounding, not to the bit, so this runs only where that was asked for: `StabilityMonitor(
fused=True)`. A recomputed forward gives the same bits again, and counts nothing. Eager mode only.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stabnorm.functional import RawMoments
from stabnorm.ops.dispatch import execution
from stabnorm.ops.moments import as_rows, is_recompute

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
    from stabnorm.ops import _triton_observed

    return _triton_observed.splits_of(device.type, device.index) if channels <= _triton_observed.WIDEST else 0


def body_for(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Spec, into: RawMoments) -> str | None:
    """The execution that can do both at once here; None: none can, or torch would do something of its own."""
    low = x.dtype in (torch.float16, torch.bfloat16)
    if low and torch.is_autocast_enabled(x.device.type):  # torch's output may be of another dtype
        return None
    if any(t is not None and (t.dtype != x.dtype or t.device != x.device) for t in (weight, bias)):
        return None
    body = execution(OP, x)
    if body == "triton":
        from stabnorm.ops._triton_observed import WIDEST

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
        if body == "triton":
            from stabnorm.ops import _triton_observed

            y, means, rstds = _triton_observed.norm(
                rows, gain, offset, spec.eps, spec.kind == "rms", into, keep, spec.tokens, spec.normalized, add
            )
        else:
            from stabnorm.ops import _cpp_observed

            y, means, rstds = _cpp_observed.norm(rows, gain, offset, spec.eps, spec.kind, into, keep, add)
        ctx.save_for_backward(x, weight, bias, means, rstds)
        ctx.spec, ctx.body = spec, body
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, means, rstds = ctx.saved_tensors
        spec: Spec = ctx.spec
        if torch.is_grad_enabled():  # create_graph=True
            return (*_through_torch(spec, x, weight, bias, dy, ctx.needs_input_grad[:3]), *[None] * 4)
        rows, upstream = (as_rows(t, -1, len(spec.shape)) for t in (x, dy))
        gain = None if weight is None else weight.reshape(-1)
        if ctx.body == "triton":
            from stabnorm.ops import _triton_observed

            dx, through, plain = _triton_observed.gradient(upstream, rows, gain, means, rstds, spec.kind == "rms")
        else:
            from stabnorm.ops import _cpp_observed

            dx, through, plain = _cpp_observed.gradient(upstream, rows, gain, means, rstds, spec.kind)
        of_weight = None if weight is None else through.to(weight.dtype).view(weight.shape)
        of_bias = None if bias is None else plain.to(bias.dtype).view(bias.shape)
        return dx.view(x.shape), of_weight, of_bias, None, None, None, None


def _through_torch(
    spec: Spec, x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients with a graph of their own."""
    inputs = (x, weight, bias)
    wanted = [t for t, needs in zip(inputs, needed, strict=True) if t is not None and needs]
    y = F.layer_norm(x, spec.shape, weight, bias, spec.eps) if spec.kind == "layer" else None
    y = F.rms_norm(x, list(spec.shape), weight, spec.eps) if y is None else y
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if t is not None and needs else None for t, needs in zip(inputs, needed, strict=True)]
