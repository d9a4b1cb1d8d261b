"""P1, P2, P4, P5: how gain and bias change, and how the optimizer updates them."""

import torch
from torch import Tensor

from stabnorm.monitor.detailed import DetailedMoments, DetailedPast
from stabnorm.monitor.past import Past
from stabnorm.statistic import PARAMETERS, Statistic

_BLOCK = 32  # numbers that share a scale in the microscaling formats
_LAST_BIN = 432 / 512  # in E4M3 a mantissa of at least this rounds to the largest number, 448


def _gain_spread(now: DetailedMoments, past: Past) -> Tensor:
    del past
    size = now.parameters.gain.abs()
    return now.max_over_channels(size) / now.median_over_channels(size)


def _share(now: DetailedMoments, which: Tensor, of: Tensor) -> Tensor:
    """Return the share of channels for which it holds; NaN if the layer has no such parameter."""
    return now.mean_over_channels(torch.where(of.isnan(), torch.nan, which.to(of.dtype)))


def _gain_near_zero(now: DetailedMoments, past: Past) -> Tensor:
    del past
    gain = now.parameters.gain
    return _share(now, gain.abs() < 1e-3, gain)


def _gain_sign_flips(now: DetailedMoments, past: DetailedPast) -> Tensor:
    product = now.parameters.gain * past.gain  # a product of signs would be 0 for NaN
    return _share(now, product < 0, product)


def _bias_drift(now: DetailedMoments, past: DetailedPast) -> Tensor:
    return now.mean_over_channels((now.parameters.bias - past.first_bias).square()).sqrt()


def _dead_gains(now: DetailedMoments, past: Past) -> Tensor:
    del past
    blended, eta = now.parameters.blended, now.parameters.eta
    uncentred = (now.second_moment + now.layout.eps[:, None]).sqrt()
    effective = blended + eta * torch.where(now.parameters.centred[:, None], now.sigma, uncentred)
    return _share(now, effective.abs() < 1e-2, effective)


def _mx_last_bin(now: DetailedMoments, past: Past) -> Tensor:
    del past
    gain = now.parameters.gain.abs()
    blocks = torch.nn.functional.pad(gain, (0, -gain.shape[-1] % _BLOCK), value=torch.nan).unflatten(-1, (-1, _BLOCK))
    known = blocks.isnan().logical_not()
    largest = torch.frexp(torch.where(known, blocks, 0).amax(-1)).exponent  # the block's shared scale
    mantissa, exponent = torch.frexp(blocks)
    last = (~known | ((exponent == largest[..., None]) & (mantissa >= _LAST_BIN))).all(-1)
    exist = known.any(-1)
    share: Tensor = (last & exist).sum(-1) / torch.where(exist.any(-1), exist.sum(-1), torch.nan)
    return share


def _adam_staleness(now: DetailedMoments, past: Past) -> Tensor:
    del past
    return now.adam[:, 0]


def _gradient_to_eps(now: DetailedMoments, past: Past) -> Tensor:
    del past
    return now.adam[:, 1]


_ADAM = "gains, biases, their gradients and Adam's moments, once a step"

PARAMETER_HEALTH = (
    Statistic(
        "gain_spread", "P1", "max_c |gain_c| / median_c |gain_c|",
        "parameter", "1", "Outlier Suppression, arXiv 2209.13325", PARAMETERS, _gain_spread, needs="parameters",
    ),
    Statistic(
        "gain_near_zero", "P1", "share of channels with |gain| < 0.001",
        "parameter", "1", "Outlier Suppression, arXiv 2209.13325", PARAMETERS, _gain_near_zero, needs="parameters",
    ),
    Statistic(
        "gain_sign_flips", "P1", "share of channels whose gain changed its sign in this step",
        "parameter", "1", "ours", PARAMETERS, _gain_sign_flips, needs="parameters", remembers=True,
    ),
    Statistic(
        "bias_drift", "P1", "rms_c(bias_c - its value at the first recorded step)",
        "parameter", "1", "ours", PARAMETERS, _bias_drift, needs="parameters", remembers=True,
    ),
    Statistic(
        "dead_gains", "P1", "share of channels with |gain on the normalised input| < 0.01: gain + eta sigma in a "
        "RepBN, lam gain + (1 - lam) (gain' + eta' sigma) in a PRepBN",
        "parameter", "1", "gains that switch themselves off, bound given there; lemma of SLAB, arXiv 2405.11582",
        PARAMETERS, _dead_gains, needs="parameters",
    ),
    Statistic(
        "mx_last_bin", "P2", "share of the blocks of 32 gains that all round to the largest number of MXFP8 E4M3: they "
        "are then all equal, which precedes divergence in such formats",
        "parameter", "1", "arXiv 2506.20752", PARAMETERS, _mx_last_bin, needs="parameters",
    ),
    Statistic(
        "adam_staleness", "P4", "sqrt(mean_i g_i^2 / max(v_i, eps^2)), i over gain and bias, v: Adam's second moment "
        "after the step, corrected for its bias, g: the gradient that Adam got; NaN without step(optimizer=) or Adam",
        "parameter", "1", "arXiv 2304.13013", _ADAM, _adam_staleness, needs="optimizer", threshold=2.3,
        advice="Adam's second moments lag behind its gradients, which precedes spikes of the loss: lower beta2, or "
        "clip the update (StableAdamW)",
    ),
    Statistic(
        "gradient_to_eps", "P5", "rms_i(g_i) / eps of Adam, i and g as above",
        "parameter", "1", "arXiv 2309.14322", _ADAM, _gradient_to_eps, needs="optimizer", least=10.0,
        advice="the gradients of gain and bias are hardly larger than Adam's eps, so their updates vanish: lower eps",
    ),
)  # fmt: skip
