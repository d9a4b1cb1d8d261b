"""F5 and P3: the gradient at the normalised input, and spikes in the gradients of gain and bias."""

import torch
from torch import Tensor

from stabnorm.monitor.detailed import SPIKE_STEPS, DetailedPast
from stabnorm.monitor.past import Moments, Past
from stabnorm.statistic import Statistic


def _grad_gain(now: Moments, past: Past) -> Tensor:
    del past
    return now.mean_over_channels(now.gain_gradient.abs())


def _grad_shift(now: Moments, past: Past) -> Tensor:
    del past
    return now.mean_over_channels(now.gradient[:, 1].abs()) / now.count.clamp(min=1)


def _grad_fluctuation(now: Moments, past: Past) -> Tensor:
    change = now.norm_over_channels(now.gain_gradient - past.gradient)
    # A sum that is zero in exact arithmetic is only rounding, in proportion to what is added up.
    shift = now.norm_over_channels(now.gradient[:, 1]) / now.count.clamp(min=1)
    rounding = 8 * torch.finfo(torch.float32).eps * shift.nan_to_num(0, posinf=0)
    usual = torch.maximum(past.gradient_power.sqrt(), rounding)
    return torch.where(usual > 0, change / usual, torch.where(change == 0, 0, torch.nan))


def _gradient_spike(now: Moments, past: DetailedPast) -> Tensor:
    usual, size = past.gradient_size, now.gradient.abs()
    score = torch.where(usual > 0, size / torch.where(usual > 0, usual, 1), size * 0)
    known = past.gradient_steps >= SPIKE_STEPS
    of_each = torch.stack([now.max_over_channels(score[:, row]) for row in (0, 1)], -1)
    highest = torch.where(known, of_each, -torch.inf).amax(-1)
    return torch.where(torch.isneginf(highest), torch.nan, highest)


_UNIFIED = "Unified Normalization, arXiv 2208.01313"
_POWER = "PowerNorm, arXiv 2003.07845"

GRADIENTS = (
    Statistic(
        "grad_gain", "F5", "mean_c |mean_n g_c xhat_c|, g the gradient at the normalised input xhat",
        "gradient", "gradient", _POWER + "; " + _UNIFIED, "free from the gain's gradient", _grad_gain,
        needs="gradients", floor=0.1, upward=True,
    ),
    Statistic(
        "grad_shift", "F5", "mean_c |mean_n g_c|; NaN for a norm that has a gain but no bias",
        "gradient", "gradient", _POWER, "free from the bias's gradient", _grad_shift, needs="gradients",
    ),
    Statistic(
        "grad_fluctuation", "F5", "||G - G_hat||_2 / sqrt(average of ||G||^2), G_c = mean_n g_c xhat_c, averages: with "
        "momentum 0.1, before the step",
        "gradient", "1", _UNIFIED, "free from the gain's gradient", _grad_fluctuation, needs="gradients",
    ),
    Statistic(
        "gradient_spike", "P3", "max_i |g_i| / average of |g_i| over the steps before (momentum 1 / steps, at least "
        "0.01; from the 11th step on), i over gain and bias, g their gradients times the gain, before clipping",
        "gradient", "1", "SPAM, arXiv 2501.06842", "free from the parameters' gradients", _gradient_spike,
        needs="gradients", threshold=50.0, remembers=True,
        advice="the gradients of its gain or bias have spikes: clip each tensor against its own past with "
        "stabnorm.callbacks.AdaptiveClipCallback, and look at the batches of these steps",
    ),
)  # fmt: skip
