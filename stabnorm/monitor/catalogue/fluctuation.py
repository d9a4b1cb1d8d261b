"""F1 to F4, F6, N2: how the channel moments of a batch differ from the past, and how many samples they contain."""

import torch
from torch import Tensor

from stabnorm.functional.detail import REST, SEQUENCES, SHIFT, SQUARES, VAR
from stabnorm.monitor.detailed import DetailedMoments
from stabnorm.monitor.past import WINDOW, Moments, Past
from stabnorm.statistic import FREE, TOKENS, Statistic


def _running_mean_distance(now: Moments, past: Past) -> Tensor:
    return now.norm_over_channels(now.mean - past.running_mean) / now.layout.channels


def _running_var_distance(now: Moments, past: Past) -> Tensor:
    return now.norm_over_channels(now.var - past.running_var) / now.layout.channels


def _mean_discrepancy(now: Moments, past: Past) -> Tensor:
    return now.mean_over_channels((past.running_mean - now.mean).abs() / now.sigma)


def _running_sigma(now: Moments, past: Past) -> Tensor:
    return (past.running_var + now.layout.eps[:, None]).sqrt()


def _var_discrepancy(now: Moments, past: Past) -> Tensor:
    return now.mean_over_channels((_running_sigma(now, past) / now.sigma - 1).abs())


def _mean_fluctuation(now: Moments, past: Past) -> Tensor:
    sigma = (past.var + now.layout.eps[:, None]).sqrt()
    return now.mean_over_channels(past.mean_var_with(now).sqrt() / sigma)


def _var_fluctuation(now: Moments, past: Past) -> Tensor:
    return now.mean_over_channels((now.log_var - past.log_var).abs())


def _absmax_fluctuation(now: Moments, past: Past) -> Tensor:
    return now.mean_over_channels((now.log_absmax - past.log_absmax).abs())


def _scale_jump(now: Moments, past: Past) -> Tensor:
    return (now.log_scale - past.log_scale).abs()


def _geometric_mean(roots: Tensor) -> Tensor:
    """Return the geometric mean of the M = 4 numbers whose roots these are, ``[L, M, C] -> [L, C]``."""
    return (roots[:, 0] * roots[:, 1]).sqrt() * (roots[:, 2] * roots[:, 3]).sqrt()


def _am_gm_ratio(now: Moments, past: Past) -> Tensor:
    window, roots = past.window_with(now), past.window.sqrt()
    geometric_before = _geometric_mean(roots)
    gap = (window.mean(1) - _geometric_mean(window.sqrt())) / geometric_before
    spread = (roots - roots.mean(1, keepdim=True)).square().mean(
        1
    ) / geometric_before  # var is 20 times slower on a CPU
    # Two measurements of the same value in float32 may differ by this much: a smaller bound is rounding.
    rounding = (8 * torch.finfo(torch.float32).eps) ** 2
    bound = WINDOW * now.mean_over_channels(spread)
    return now.mean_over_channels(gap) / bound.clamp(min=rounding)


def _effective_samples(now: DetailedMoments, past: Past) -> Tensor:
    """Use the variance of a mean over clusters of unequal size (Cochran, Sampling Techniques, 1977, chapter 9A)."""
    del past
    detail, dtype = now.detail, now.mean.dtype
    sequences, squares = (detail.counts[:, column].to(dtype) for column in (SEQUENCES, SQUARES))
    moments = detail.sequences.to(dtype)
    distance = moments[:, SHIFT] + moments[:, REST] - now.mean  # here squared lengths are the weights, there lengths
    spread = squares[:, None] * (moments[:, VAR] + distance.square()) / now.count.clamp(min=1)[:, None].to(dtype) ** 2
    of_mean = spread * (sequences / (sequences - 1))[:, None]
    varies = now.var > 0
    relative = torch.where(varies, of_mean / torch.where(varies, now.var, 1), 0)
    share = now.mean_over_channels(varies.to(dtype))
    samples = share / now.mean_over_channels(torch.where(now.var.isnan(), torch.nan, relative))
    return torch.where((sequences > 1) & (share > 0), samples, torch.nan)


def _rank_share(now: Moments, past: Past) -> Tensor:
    del past
    return now.mean_over_channels(now.between / (now.var + now.layout.eps[:, None]))


_NOISY = (
    "its statistics differ from batch to batch: a BatchNorm needs larger batches, or a norm in its place that does not "
    "read the batch, behind stabnorm.remedies.standardize_weights"
)
_DISCREPANCY = (
    "evaluation uses other statistics than training: use larger batches or a smaller momentum, or measure them again "
    "after training with stabnorm.recalibrate.recalibrate_norms"
)
_UNIFIED = "Unified Normalization, arXiv 2208.01313"
_POWER = "PowerNorm, arXiv 2003.07845"

FLUCTUATION = (
    Statistic(
        "running_mean_distance", "F1", "(1/C) ||mu_c - mu_hat_c||_2; hat: the layer's own running buffer, or, if it "
        "has none, a moving average (momentum 0.1), as it was before the step",
        "channel", "x", _POWER, FREE, _running_mean_distance,
    ),
    Statistic(
        "running_var_distance", "F1", "(1/C) ||var_c - var_hat_c||_2; hat as above",
        "channel", "x^2", _POWER, FREE, _running_var_distance,
    ),
    Statistic(
        "mean_discrepancy", "F2", "mean_c |mu_hat_c - mu_c| / sigma_c, sigma = sqrt(var + eps): training-inference "
        "discrepancy of the mean",
        "channel", "1", "TID, arXiv 2210.05153; bound ours", FREE, _mean_discrepancy, threshold=0.5,
        advice=_DISCREPANCY,
    ),
    Statistic(
        "var_discrepancy", "F2", "mean_c |sigma_hat_c / sigma_c - 1|: training-inference discrepancy of the scale",
        "channel", "1", "TID, arXiv 2210.05153; bound ours", FREE, _var_discrepancy, threshold=0.5,
        advice=_DISCREPANCY,
    ),
    Statistic(
        "mean_fluctuation", "F3", "mean_c sd_t(mu_c) / sigma_hat_c, sd: standard deviation over time with an "
        "exponential window (momentum 0.1)",
        "channel", "1", _UNIFIED, FREE, _mean_fluctuation, advice=_NOISY,
    ),
    Statistic(
        "var_fluctuation", "F3", "mean_c |log(var_c + eps) - its value one step before|",
        "channel", "1", _UNIFIED, FREE, _var_fluctuation, floor=0.3, upward=True, advice=_NOISY,
    ),
    Statistic(
        "absmax_fluctuation", "F3", "mean_c |log(max_n |x| + sqrt eps) - its value one step before|",
        "channel", "1", _UNIFIED, "two reads", _absmax_fluctuation, floor=0.3, upward=True,
    ),
    Statistic(
        "scale_jump", "F3", "|log(s) - its value one step before|, s = mean_n token standard deviation + sqrt eps",
        "token", "1", "ours: healthy starts stay below 0.07, runs without warm-up pass 1", TOKENS, _scale_jump,
        needs="tokens", threshold=0.5, alarm=0.5,
        advice="the scale of its input jumped from one step to the next: look at the learning rate, the warm-up and "
        "this step's batch",
    ),
    Statistic(
        "am_gm_ratio", "F4", "mean_c[(AM - GM) / GM'] / (M mean_c[Var(sqrt psi') / GM']), psi = mean_n x^2 over the "
        "last M = 4 steps, primes: of the window before this step; > 1: Unified Normalization would filter the batch",
        "channel", "1", _UNIFIED + ", calibrated per layer", FREE, _am_gm_ratio, threshold=1.0,
        advice="its scale changes in bursts from batch to batch: look for outliers in the data",
    ),
    Statistic(
        "rank_share", "F6", "mean_c Var_r(mu_c) / (var_c + eps), Var_r: variance of the means of the ranks, weighted "
        "by tokens: the share of the variance that a batch norm on each rank does not see; NaN on one process",
        "channel", "1", "law of total variance; bound ours", "free if ranks merge", _rank_share, threshold=0.1,
        advice="ranks get different data, so the statistics of a rank are not those of the batch: synchronise batch "
        "norms, or shuffle the data before it is split",
    ),
    Statistic(
        "effective_samples", "N2", "1 / mean_c(V_c / var_c), V_c = B / (B - 1) sum_b n_b^2 (mu_bc - mu_c)^2 / N^2: the "
        "number of independent tokens that would give means of the same accuracy; sequences b are the entries of the "
        "input's first axis, with n_b valid tokens each; channels that do not vary are left out; NaN for one sequence",
        "channel", "token", "the variance of a mean over clusters, Cochran 1977", "two passes", _effective_samples,
        needs="sequences",
    ),
)  # fmt: skip
