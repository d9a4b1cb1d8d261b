"""S1 to S3: how large the tokens are, and how close they are to eps and to the limits of the dtype."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stabnorm.functional.detail import NONFINITE, ZEROS
from stabnorm.functional.moments import EPS_SHARE, MEAN_MAX, MEAN_MIN, STD_MAX, STD_MEAN, STD_MIN
from stabnorm.monitor.detailed import DetailedMoments
from stabnorm.monitor.past import Moments, Past
from stabnorm.statistic import TOKENS, Statistic


def _token(row: int) -> Callable[[Moments, Past], Tensor]:
    return lambda now, past: now.token[:, row]


def _mean(now: Moments, past: Past) -> Tensor:
    """From the means of channels, which have a shift: added up over thousands of forwards they lose no digit."""
    del past
    return now.mean_over_channels(now.mean)


def _eps_share(now: Moments, past: Past) -> Tensor:
    del past
    below = (now.var < 10 * now.layout.eps[:, None]).to(now.var.dtype)
    return torch.where(now.layout.per_channel, now.mean_over_channels(below), now.token[:, EPS_SHARE])


def _headroom(now: DetailedMoments, past: Past) -> Tensor:
    del past
    return now.detail.range_bits.to(now.mean.dtype) - now.absmax.amax(-1).log2()


def _headroom_fp16(now: Moments, past: Past) -> Tensor:
    del past
    return math.log2(torch.finfo(torch.float16).max) - now.absmax.amax(-1).log2()


def _nonfinite_count(now: DetailedMoments, past: Past) -> Tensor:
    del past
    return now.detail.counts[:, NONFINITE].to(now.mean.dtype)


def _zero_share(now: DetailedMoments, past: Past) -> Tensor:
    del past
    return now.detail.counts[:, ZEROS] / (now.count.clamp(min=1) * now.layout.channels)


_PERI_LN = "Peri-LN, arXiv 2502.02732"
_HEADROOM = "Hugging Face's DebugUnderflowOverflow; Transformer Engine"

SCALE = (
    Statistic(
        "token_std_mean", "S1", "mean_n sqrt(v_n), v_n = variance over channels",
        "token", "x", _PERI_LN, TOKENS, _token(STD_MEAN), needs="tokens", floor=0.05,
    ),
    Statistic(
        "token_std_min", "S1", "min_n sqrt(v_n)",
        "token", "x", _PERI_LN, TOKENS, _token(STD_MIN), needs="tokens",
    ),
    Statistic(
        "token_std_max", "S1", "max_n sqrt(v_n)",
        "token", "x", _PERI_LN, TOKENS, _token(STD_MAX), needs="tokens",
    ),
    Statistic(
        "token_mean_mean", "S1", "mean_n m_n, m_n = mean over channels",
        "token", "x", _PERI_LN, TOKENS, _mean, needs="tokens",
    ),
    Statistic(
        "token_mean_min", "S1", "min_n m_n",
        "token", "x", _PERI_LN, TOKENS, _token(MEAN_MIN), needs="tokens",
    ),
    Statistic(
        "token_mean_max", "S1", "max_n m_n",
        "token", "x", _PERI_LN, TOKENS, _token(MEAN_MAX), needs="tokens",
    ),
    Statistic(
        "eps_share", "S2", "share of the variances the layer divides by that are below 10 eps: those of tokens "
        "(LayerNorm), channels (BatchNorm) or groups (GroupNorm, InstanceNorm), or mean squares of tokens (RMSNorm)",
        "token", "1", "definition of the norm, which then shrinks its output; bounds ours", TOKENS, _eps_share,
        needs="tokens", threshold=0.01, alarm=0.5, crosses=True,
        advice="it divides by variances below 10 eps, so it shrinks its output: look at how its input is initialised, "
        "or whether a layer before it has died",
    ),
    Statistic(
        "headroom", "S3", "log2(fmax / max |x|), fmax: the largest number of the input's dtype: how many times the "
        "input can still double",
        "layer", "1", _HEADROOM, "free", _headroom, needs="values", least=1.0,
        advice="its input is close to the largest number of its dtype: use bfloat16 or float32 there, or look for the "
        "cause of the growth",
    ),
    Statistic(
        "headroom_fp16", "S3", "log2(65504 / max |x|): the same for float16, whatever the dtype is",
        "layer", "1", _HEADROOM, "free", _headroom_fp16,
    ),
    Statistic(
        "nonfinite_count", "S3", "number of NaN and infinite elements",
        "layer", "1", _HEADROOM, "two passes", _nonfinite_count, needs="values",
    ),
    Statistic(
        "zero_share", "S3", "share of elements that are exactly 0",
        "layer", "1", _HEADROOM, "two passes", _zero_share, needs="values",
    ),
)  # fmt: skip
