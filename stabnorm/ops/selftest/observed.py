"""The comparison of `stabnorm.ops.observed`."""

import functools

import torch

from stabnorm.functional import RawMoments
from stabnorm.ops.accumulators import empty_accumulators, merge_accumulators
from stabnorm.ops.dispatch import REFERENCE
from stabnorm.ops.observed import (
    NormKind,
    Spec,
    backend_for,
    norm_gradient,
    norm_with_moments,
    observed_norm,
    splits_for,
)
from stabnorm.ops.selftest import Case, Results, halves, kept
from stabnorm.ops.selftest.moments import of_accumulator


def observed(case: Case, kind: NormKind) -> Results:
    """Compute a norm and its moments together in two forwards, and their backward."""
    _, weight, bias, *_ = (vector.to(case.x.dtype) for vector in case.vectors.unbind())
    bias_ = bias if kind == "layer" else None
    x = case.x.detach().requires_grad_()
    inputs = [x, weight.requires_grad_(), *([] if bias_ is None else [bias_.requires_grad_()])]
    channels = x.shape[1]
    spec = Spec(kind, (channels,), 1e-5, True, True)
    accumulators = empty_accumulators(1, channels, x.device, splits_for(channels, x.device))
    if x.dtype == torch.float64:
        accumulators = RawMoments(accumulators.seen, accumulators.channel.double(), accumulators.token.double())
    into = RawMoments(*(part[0] for part in accumulators))
    backend = backend_for(x, weight, bias_, spec, into) or REFERENCE
    outputs = []
    for part, rows in halves(x):
        if rows.numel():
            valid = None if case.valid is None else case.valid[part]
            outputs.append(observed_norm(rows, weight, bias_, spec, valid, into, backend))
    y = torch.cat(outputs)
    gradients = torch.autograd.grad(y, inputs, case.dy)
    results = of_accumulator(case, RawMoments(*(part[0] for part in merge_accumulators(accumulators))))
    natural, dy, width = kept(case, case.x.double()), case.dy.double(), channels**0.5
    spread = natural.var(1, correction=0, keepdim=True).add(1e-5).rsqrt().clamp(min=1) * (1 + natural.abs())
    of_dx = (dy * weight.double()).abs().amax(1, keepdim=True) * spread
    results["y"] = (kept(case, y.detach()), weight.abs() * width * spread, True)
    results["dx"] = (kept(case, gradients[0]), of_dx, True)
    if case.valid is None:  # padding full of NaN is in the gradients of gain and bias
        total = dy.square().sum(0).sqrt() * 10 + 1e-3
        results["gain"] = (gradients[1].float(), total * width * spread.amax(), True)
        if bias_ is not None:
            results["bias"] = (gradients[2].float(), total, True)
    return results


KINDS: tuple[NormKind, ...] = ("layer", "rms")
for kind in KINDS:
    norm_with_moments.check(functools.partial(observed, kind=kind))
norm_gradient.checks = norm_with_moments.checks
