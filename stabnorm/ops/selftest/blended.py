"""The comparisons of `stabnorm.ops.blended`."""

import functools

import torch

from stabnorm.ops.blended import LayerNormArgs, TokenMoments, blended_gradient, blended_norm, blended_sums
from stabnorm.ops.rows import BatchMap
from stabnorm.ops.selftest import Case, Results, kept


def forward_and_backward(case: Case, lam_: float) -> Results:
    """Run both norms of a PRepBN, forward and backward, as its autograd function does."""
    mean, scale, shift, slope, weight, bias = case.vectors.unbind()
    scale = scale / 4
    lam, natural = torch.tensor(lam_, device=case.x.device), case.x.double().nan_to_num(0)
    backend = blended_norm.chosen(case.x, case.valid)
    own, of = LayerNormArgs(weight, bias, 1e-5), BatchMap(scale, slope, shift, mean)
    y, *of_tokens = blended_norm.on(backend)(lam, case.x, own, scale, shift)
    tokens = TokenMoments(*of_tokens)
    sums = blended_sums.on(backend)(lam, case.dy, case.x, mean, case.valid, tokens)
    dx, of_weight, of_bias = blended_gradient.on(backend)(lam, case.dy, case.x, case.valid, own, of, tokens, sums)
    y, dx = kept(case, y), kept(case, dx)
    dy, width = case.dy.double(), case.x.shape[1] ** 0.5
    # ATen's LayerNorm, which some backends use, loses this much if a token's mean is far above its spread.
    spread = natural.var(1, correction=0, keepdim=True).add(1e-5).rsqrt().clamp(min=1) * (1 + natural.abs())
    total = dy.square().sum(0).sqrt() * 10 + 1e-3
    results: Results = {
        "y": (y, weight.abs() * width * spread + (natural * scale).abs() + shift.abs() + bias.abs(), True)
    }
    if lam_ == 1:  # the rest is torch's own LayerNorm
        return results
    of_dx = (dy * weight).abs().amax(1, keepdim=True) * spread + ((natural - mean) * slope).abs() + 1
    results["dx"] = (dx, of_dx, True)
    if lam_ > 0 and case.valid is None:  # padding full of NaN is in LayerNorm's own gradient
        results |= {"gain": (of_weight, total * width * spread.amax(), True), "bias": (of_bias, total, True)}
    of_x = (natural - mean).abs().amax() + 1
    for name, total_ in (("plain", sums.plain_valid), ("weighted", sums.weighted_valid)):
        results[name] = (total_, total * of_x, False)
    return results


for lam in (0.0, 0.3, 1.0):
    blended_norm.check(functools.partial(forward_and_backward, lam_=lam))
blended_sums.checks = blended_gradient.checks = blended_norm.checks
