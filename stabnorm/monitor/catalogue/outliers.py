"""O1 to O7: how far single activations and channels stand out, and whether they are the same in every step."""

import torch
from torch import Tensor

from stabnorm.functional.detail import KURTOSIS, MAX_TO_MEDIAN, MEDIAN, OUTPUTS
from stabnorm.monitor.detailed import DetailedMoments
from stabnorm.monitor.past import Moments, Past
from stabnorm.statistic import FREE, MEDIANS, Statistic, per_step

TOP = 3  # number of channels that are tracked


def _amax(now: Moments, past: Past) -> Tensor:
    del past
    return now.absmax.amax(-1)


def _crest(now: Moments, past: Past) -> Tensor:
    return _amax(now, past) / now.mean_over_channels(now.second_moment).sqrt()


def _channel_spread(now: Moments, past: Past) -> Tensor:
    del past
    return now.absmax.amax(-1) / now.median_over_channels(now.absmax)


def _median(now: DetailedMoments) -> Tensor:
    return now.detail.means[:, MEDIAN].to(now.mean.dtype)


def _massive_activation(now: DetailedMoments, past: Past) -> Tensor:
    amax = _amax(now, past)
    return torch.minimum(amax / 100, amax / (1000 * _median(now)))


def _massive_channels(now: DetailedMoments, past: Past) -> Tensor:
    del past
    massive = (now.absmax > 100) & (now.absmax >= 1000 * _median(now)[:, None])
    return torch.where(_median(now).isnan(), torch.nan, massive.sum(-1))


def _max_to_median(now: DetailedMoments, past: Past) -> Tensor:
    del past
    return now.detail.means[:, MAX_TO_MEDIAN].to(now.mean.dtype)


def _feature_kurtosis(now: Moments, past: Past) -> Tensor:
    del past
    scale = now.second_moment.amax(-1, keepdim=True)  # x^4 of a large activation would overflow
    relative = now.second_moment / scale
    return now.mean_over_channels(relative.square()) / now.mean_over_channels(relative).square()


def _token_kurtosis(now: DetailedMoments, past: Past) -> Tensor:
    del past
    return now.detail.means[:, KURTOSIS].to(now.mean.dtype)


@per_step
def _outlying(now: DetailedMoments) -> tuple[Tensor, Tensor]:
    """Return which channels are outliers in at least 6 % of positions, ``[L, C]``, and for which layers it is known."""
    positions = now.detail.counts[:, OUTPUTS, None]
    return (100 * now.detail.outputs >= 6 * positions) & (positions > 0), positions[:, 0] > 0


def _outlier_dims(now: DetailedMoments, past: Past) -> Tensor:
    del past
    dims, known = _outlying(now)
    return torch.where(known, dims.sum(-1), torch.nan).to(now.mean.dtype)


def _outlier_dims_deep(now: DetailedMoments, past: Past) -> Tensor:
    del past
    dims, known = _outlying(now)
    channels = now.layout.channels
    alike = ((channels[:, None] == channels) & known).to(channels.dtype)
    in_a_quarter = 4 * (alike @ dims.to(channels.dtype)) >= alike.sum(-1, keepdim=True)
    return torch.where(known, (dims & in_a_quarter).sum(-1), torch.nan).to(now.mean.dtype)


def _top_channels(now: Moments, power: Tensor) -> Tensor:
    """Return which channels have the largest second moments, ``[L, C]`` bool."""
    if now.layout.exists is not None:
        power = power.masked_fill(~now.layout.exists, -torch.inf)
    top = power.topk(min(TOP, power.shape[-1]))
    chosen = torch.zeros_like(power, dtype=torch.bool)
    return chosen.scatter_(-1, top.indices, ~torch.isneginf(top.values))


def _powers(now: Moments, past: Past) -> tuple[Tensor, Tensor, Tensor]:
    """Return second moments of this step and of the past, and whether both are known and finite."""
    new, old = now.second_moment, past.var + past.mean.square()
    return new, old, torch.isfinite(now.norm_over_channels(old)) & torch.isfinite(now.norm_over_channels(new))


def _outlier_overlap(now: Moments, past: Past) -> Tensor:
    new, old, known = _powers(now, past)
    ours, theirs = _top_channels(now, new), _top_channels(now, old)
    return torch.where(known, (ours & theirs).sum(-1) / (ours | theirs).sum(-1).to(new.dtype), torch.nan)


def _new_outlier_share(now: Moments, past: Past) -> Tensor:
    new, old, known = _powers(now, past)
    shares = [power / (now.mean_over_channels(power) * now.layout.channels)[:, None] for power in (new, old)]
    gained = (shares[0] - shares[1]).masked_fill(_top_channels(now, old), 0)
    return torch.where(known, now.max_over_channels(gained).clamp(min=0), torch.nan)


_BONDARENKO = "arXiv 2306.12929"
_MASSIVE = "massive activations, arXiv 2402.17762"
_FEATURES = "outlier features, arXiv 2405.19279"
_INT8 = "LLM.int8, arXiv 2208.07339"

OUTLIERS = (
    Statistic(
        "amax", "O1", "max |x|",
        "layer", "x", _BONDARENKO, "two reads", _amax, floor=0.1,
    ),
    Statistic(
        "crest", "O1", "max |x| / rms(x)",
        "layer", "1", _BONDARENKO + "; bound: " + _MASSIVE, "two reads", _crest,
        threshold=1000.0, advice="massive activations: look at its top channels",
    ),
    Statistic(
        "channel_spread", "O1", "max_c a_c / median_c a_c, a_c = max_n |x_c|: how much the ranges of channels differ, "
        "which matters to a quantiser with one scale",
        "channel", "1", "RepQ-ViT, arXiv 2212.08254", "two reads", _channel_spread,
        advice="its channels have very different ranges: before it is quantised, apply "
        "stabnorm.remedies.equalize_channels",
    ),
    Statistic(
        "massive_activation", "O2", "min(max |x| / 100, max |x| / (1000 median)), median = mean_n median_c |x|; at 1 "
        "or more, an activation is massive by the published rule; the record has the three largest, as top channels",
        "layer", "1", _MASSIVE, MEDIANS, _massive_activation, needs="token_shape", threshold=1.0,
        advice="massive activations: keep these channels out of low precision, or apply "
        "stabnorm.remedies.equalize_channels, and look at its top channels",
    ),
    Statistic(
        "massive_channels", "O2", "number of channels with max_n |x| > 100 and >= 1000 median, median as above",
        "channel", "1", _MASSIVE, MEDIANS, _massive_channels, needs="token_shape",
    ),
    Statistic(
        "max_to_median", "O3", "MMR: mean_n max_c |x| / max(median_c |x|, sqrt eps)",
        "token", "1", _FEATURES, MEDIANS, _max_to_median, needs="token_shape",
    ),
    Statistic(
        "feature_kurtosis", "O4", "mean_c(s_c^2) / (mean_c s_c)^2, s_c = mean_n x^2: 1 flat, C one channel",
        "channel", "1", _FEATURES, FREE, _feature_kurtosis,
    ),
    Statistic(
        "token_kurtosis", "O5", "mean_n [mean_c (x - m_n)^4 / max(v_n, eps)^2]: 3 for Gaussian tokens, at most C",
        "token", "1", _BONDARENKO, MEDIANS, _token_kurtosis, needs="token_shape",
    ),
    Statistic(
        "outlier_dims", "O6", "number of channels of the norm's output with |y| >= 6 in at least 6 % of the tokens",
        "channel", "1", _INT8, "three passes over the output", _outlier_dims, needs="outputs",
    ),
    Statistic(
        "outlier_dims_deep", "O6", "number of these channels that are outliers in at least 25 % of the layers of the "
        "same width",
        "depth", "1", _INT8, "three passes over the output", _outlier_dims_deep, needs="outputs",
    ),
    Statistic(
        "outlier_overlap", "O7", "|A n B| / |A u B|, A: the three channels with the largest mean_n x^2, B: those with "
        "the largest moving average of it (momentum 0.1) before the step; 1: they are the same",
        "channel", "1", _MASSIVE + ": they stay in few fixed channels", FREE, _outlier_overlap,
    ),
    Statistic(
        "new_outlier_share", "O7", "max_{c not in B} (p_c - p_hat_c), p_c = s_c / sum_c s_c, s_c = mean_n x^2, hat: of "
        "the moving average, B as above: the share of the power gained by a channel that was not among the three "
        "largest",
        "channel", "1", _MASSIVE + "; bound ours", FREE, _new_outlier_share, threshold=0.5, alarm=0.5,
        advice="a channel became an outlier from one step to the next: look at the layer that writes it",
    ),
)  # fmt: skip
