"""The catalogue: every statistic with its formula, axis, source, cost and threshold. The documentation prints it.

Shape legend: L layers, C channels (padded). A statistic is a function of this step's merged `Moments` and of the
`Past` before the step, and gives one number per layer, `[L]`; NaN where it is not defined (yet).
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stabnorm.functional import EPS_SHARE, MEAN_MAX, MEAN_MEAN, MEAN_MIN, STD_MAX, STD_MEAN, STD_MIN
from stabnorm.monitor.past import WINDOW, Moments, Past

Axis = Literal["channel", "token", "layer", "gradient"]
Unit = Literal["1", "x", "x^2", "gradient"]
Needs = Literal["tokens", "normalized", "gradients"]


@dataclass(frozen=True)
class Statistic:
    """One row of the catalogue.

    Attributes:
        name: as in `history()`, in tags and in alerts.
        number: its number in the literature survey.
        formula: what it is; c runs over channels, n over tokens, hats are the layer's past.
        axis: "channel": from moments over tokens (BatchNorm's view); "token": from moments over channels (LayerNorm's).
        unit: "1": dimensionless; "x": that of the layer's input; "x^2"; "gradient".
        source: where it comes from.
        cost: what it costs beyond the channel moments.
        compute: ``(moments, past) -> [L]``.
        needs: what the hooks must gather for it, beside the channel moments.
        threshold: beyond this the literature (or we, where `source` says so) calls it bad; for the closing table.
        alarm: beyond this an alert is raised at once, with no past needed.
        floor: not None: a robust z-score of its logarithm against the layer's own past is watched, and this is the
            least scale, in log units: 6 floors are the smallest change that can raise an alert.
        advice: what it means when it is over its bound, and where to look.
    """

    name: str
    number: str
    formula: str
    axis: Axis
    unit: Unit
    source: str
    cost: str
    compute: Callable[[Moments, Past], Tensor]
    needs: Needs | None = None
    threshold: float | None = None
    alarm: float | None = None
    floor: float | None = None
    advice: str = ""


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


def _am_gm_ratio(now: Moments, past: Past) -> Tensor:
    window, logs = past.windows_with(now)
    geometric_before = past.log_window.mean(0).exp()
    gap = (window.mean(0) - logs.mean(0).exp()) / geometric_before
    roots = past.window.sqrt()
    spread = (roots - roots.mean(0)).square().mean(0) / geometric_before  # var over dim 0 is 20 times slower on a CPU
    bound = WINDOW * now.mean_over_channels(spread)
    return now.mean_over_channels(gap) / bound.clamp(min=torch.finfo(torch.float32).tiny)


def _eps_share(now: Moments, past: Past) -> Tensor:
    del past
    below = (now.var < 10 * now.layout.eps[:, None]).to(now.var.dtype)
    return torch.where(now.layout.per_channel, now.mean_over_channels(below), now.token[:, EPS_SHARE])


def _token(row: int) -> Callable[[Moments, Past], Tensor]:
    return lambda now, past: now.token[:, row]


def _amax(now: Moments, past: Past) -> Tensor:
    del past
    return now.absmax.amax(-1)


def _crest(now: Moments, past: Past) -> Tensor:
    return _amax(now, past) / now.mean_over_channels(now.second_moment).sqrt()


def _feature_kurtosis(now: Moments, past: Past) -> Tensor:
    del past
    scale = now.second_moment.amax(-1, keepdim=True)  # x^4 of a large activation would overflow
    relative = now.second_moment / scale
    return now.mean_over_channels(relative.square()) / now.mean_over_channels(relative).square()


def _affine_residual(now: Moments, past: Past) -> Tensor:
    del past
    # A channel of n that does not vary is reproduced by a constant, one of x that does not vary reproduces nothing.
    constant_n = now.var_n <= 1e-12 * now.mean_n.square()
    power = now.var * now.var_n
    correlated = torch.where(power > 0, now.cov_xn.square() / power.clamp(min=torch.finfo(power.dtype).tiny), power * 0)
    explained = torch.where(constant_n, torch.where(now.var_n.isnan(), torch.nan, 1), correlated)
    residual = (1 - now.mean_over_channels(explained)).clamp(min=0)
    return torch.where(now.layout.per_channel, 0, residual)


def _grad_gain(now: Moments, past: Past) -> Tensor:
    del past
    return now.mean_over_channels(now.gain_gradient.abs())


def _grad_shift(now: Moments, past: Past) -> Tensor:
    del past
    return now.mean_over_channels(now.gradient[:, 1].abs()) / now.count.clamp(min=1)


def _grad_fluctuation(now: Moments, past: Past) -> Tensor:
    return now.norm_over_channels(now.gain_gradient - past.gradient) / past.gradient_power.sqrt()


def _rank_share(now: Moments, past: Past) -> Tensor:
    del past
    return now.mean_over_channels(now.between / (now.var + now.layout.eps[:, None]))


_DISCREPANCY = (
    "evaluation sees other statistics than training: use larger batches, a smaller momentum, or recompute them at last"
)
_FREE = "free from the channel moments"
_TOKENS = "one pass for mean and variance of the tokens"
_UNIFIED = "Unified Normalization, arXiv 2208.01313"
_POWER = "PowerNorm, arXiv 2003.07845"
_PERI_LN = "Peri-LN, arXiv 2502.02732"
_CATALOGUE = (
    Statistic(
        "running_mean_distance", "F1", "(1/C) ||mu_c - mu_hat_c||_2; hat: the layer's own running buffer, or a moving "
        "average (momentum 0.1) where it has none, as it was before the step",
        "channel", "x", _POWER, _FREE, _running_mean_distance,
    ),
    Statistic(
        "running_var_distance", "F1", "(1/C) ||var_c - var_hat_c||_2; hat as above",
        "channel", "x^2", _POWER, _FREE, _running_var_distance,
    ),
    Statistic(
        "mean_discrepancy", "F2", "mean_c |mu_hat_c - mu_c| / sigma_c, sigma = sqrt(var + eps): training-inference "
        "discrepancy of the mean",
        "channel", "1", "TID, arXiv 2210.05153; bound ours", _FREE, _mean_discrepancy, threshold=0.5,
        advice=_DISCREPANCY,
    ),
    Statistic(
        "var_discrepancy", "F2", "mean_c |sigma_hat_c / sigma_c - 1|: training-inference discrepancy of the scale",
        "channel", "1", "TID, arXiv 2210.05153; bound ours", _FREE, _var_discrepancy, threshold=0.5,
        advice=_DISCREPANCY,
    ),
    Statistic(
        "mean_fluctuation", "F3", "mean_c sd_t(mu_c) / sigma_hat_c, sd over time with an exponential window (momentum "
        "0.1)",
        "channel", "1", _UNIFIED, _FREE, _mean_fluctuation,
    ),
    Statistic(
        "var_fluctuation", "F3", "mean_c |log(var_c + eps) - the same of the step before|",
        "channel", "1", _UNIFIED, _FREE, _var_fluctuation, floor=0.3,
    ),
    Statistic(
        "absmax_fluctuation", "F3", "mean_c |log(max_n |x| + sqrt eps) - the same of the step before|",
        "channel", "1", _UNIFIED, "two reads", _absmax_fluctuation, floor=0.3,
    ),
    Statistic(
        "scale_jump", "F3", "|log(s) - the same of the step before|, s = mean_n token standard deviation + sqrt eps",
        "token", "1", "ours: healthy starts stay below 0.07, runs without warm-up pass 1", _TOKENS, _scale_jump,
        needs="tokens", threshold=0.5, alarm=0.5,
        advice="the scale of its input jumped from one step to the next: look at the learning rate, the warm-up and "
        "this step's batch",
    ),
    Statistic(
        "am_gm_ratio", "F4", "mean_c[(AM - GM) / GM'] / (M mean_c[Var(sqrt psi') / GM']), psi = mean_n x^2 over the "
        "last M = 4 steps, primes: the window before this step; > 1: Unified Normalization would filter the batch",
        "channel", "1", _UNIFIED + ", calibrated per layer", _FREE, _am_gm_ratio, threshold=1.0,
        advice="its scale differs from batch to batch by bursts: look at the data for outliers",
    ),
    Statistic(
        "rank_share", "F6", "mean_c Var_r(mu_c) / (var_c + eps), Var_r: variance of the ranks' means, weighted by "
        "tokens; the share of the variance that a batch norm per rank does not see; NaN on one process",
        "channel", "1", "law of total variance; bound ours", "free where ranks merge", _rank_share, threshold=0.1,
        advice="ranks see different data, so that statistics per rank are not those of the batch: synchronise batch "
        "norms, or shuffle before the data is split",
    ),
    Statistic(
        "token_std_mean", "S1", "mean_n sqrt(v_n), v_n = variance over channels",
        "token", "x", _PERI_LN, _TOKENS, _token(STD_MEAN), needs="tokens", floor=0.05,
    ),
    Statistic(
        "token_std_min", "S1", "min_n sqrt(v_n)",
        "token", "x", _PERI_LN, _TOKENS, _token(STD_MIN), needs="tokens",
    ),
    Statistic(
        "token_std_max", "S1", "max_n sqrt(v_n)",
        "token", "x", _PERI_LN, _TOKENS, _token(STD_MAX), needs="tokens",
    ),
    Statistic(
        "token_mean_mean", "S1", "mean_n m_n, m_n = mean over channels",
        "token", "x", _PERI_LN, _TOKENS, _token(MEAN_MEAN), needs="tokens",
    ),
    Statistic(
        "token_mean_min", "S1", "min_n m_n",
        "token", "x", _PERI_LN, _TOKENS, _token(MEAN_MIN), needs="tokens",
    ),
    Statistic(
        "token_mean_max", "S1", "max_n m_n",
        "token", "x", _PERI_LN, _TOKENS, _token(MEAN_MAX), needs="tokens",
    ),
    Statistic(
        "eps_share", "S2", "share of the variances the layer divides by that lie below 10 eps: tokens' variances "
        "(LayerNorm), mean squares (RMSNorm), channels' (BatchNorm), groups' (GroupNorm, InstanceNorm)",
        "token", "1", "the norm's definition: it then shrinks its output; bounds ours", _TOKENS, _eps_share,
        needs="tokens", threshold=0.01, alarm=0.5,
        advice="variances it divides by are below 10 eps, so that it shrinks its output: look at how its input is "
        "initialised, or at what died before it",
    ),
    Statistic(
        "amax", "O1", "max |x|",
        "layer", "x", "arXiv 2306.12929", "two reads", _amax, floor=0.1,
    ),
    Statistic(
        "crest", "O1", "max |x| / rms(x)",
        "layer", "1", "arXiv 2306.12929; bound: massive activations, arXiv 2402.17762", "two reads", _crest,
        threshold=1000.0, advice="massive activations: look at its top channels",
    ),
    Statistic(
        "feature_kurtosis", "O4", "mean_c(s_c^2) / (mean_c s_c)^2, s_c = mean_n x^2: 1 flat, C one channel",
        "channel", "1", "outlier features, arXiv 2405.19279", _FREE, _feature_kurtosis,
    ),
    Statistic(
        "affine_residual", "A", "1 - mean_c corr_n(x_c, n_c)^2, n the normalised input before gain and bias: what no "
        "affine map per channel reproduces; 0 for BatchNorm",
        "channel", "1", "ours; below 0.3 a layer could leave LayerNorm", "five passes", _affine_residual,
        needs="normalized",
    ),
    Statistic(
        "grad_gain", "F5", "mean_c |mean_n g_c xhat_c|, g the gradient at the normalised input xhat",
        "gradient", "gradient", _POWER + "; " + _UNIFIED, "free from the gain's gradient", _grad_gain,
        needs="gradients", floor=0.1,
    ),
    Statistic(
        "grad_shift", "F5", "mean_c |mean_n g_c|; NaN for a norm with a gain and no bias",
        "gradient", "gradient", _POWER, "free from the bias's gradient", _grad_shift, needs="gradients",
    ),
    Statistic(
        "grad_fluctuation", "F5", "||G - G_hat||_2 / sqrt(average of ||G||^2), G_c = mean_n g_c xhat_c, averages with "
        "momentum 0.1 before the step",
        "gradient", "1", _UNIFIED, "free from the gain's gradient", _grad_fluctuation, needs="gradients",
    ),
)  # fmt: skip

CATALOGUE: dict[str, Statistic] = {statistic.name: statistic for statistic in _CATALOGUE}
PRESETS: dict[str, tuple[str, ...]] = {
    "economy": ("mean_fluctuation", "var_fluctuation", "absmax_fluctuation"),
    "standard": tuple(CATALOGUE),
}


def resolve(preset: str | Sequence[str]) -> tuple[Statistic, ...]:
    """The statistics behind a preset's name or a list of statistics by name.

    Raises:
        ValueError: for an unknown name (the nearest one is suggested) or an empty list.

    >>> [s.number for s in resolve(["amax", "crest"])]
    ['O1', 'O1']
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            hint = (
                f"; a single statistic is asked for as [{preset!r}]"
                if preset in CATALOGUE
                else _nearest(preset, PRESETS)
            )
            raise ValueError(f"unknown preset {preset!r}: the presets are {', '.join(PRESETS)}{hint}")
        preset = PRESETS[preset]
    names = tuple(dict.fromkeys(preset))
    if not names:
        raise ValueError("the list of statistics is empty: name at least one, or a preset such as 'standard'")
    for name in names:
        if name not in CATALOGUE:
            raise ValueError(f"unknown statistic {name!r}{_nearest(name, CATALOGUE)}; known: {', '.join(CATALOGUE)}")
    return tuple(CATALOGUE[name] for name in names)


def _nearest(name: str, known: dict[str, object] | dict[str, Statistic] | dict[str, tuple[str, ...]]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def catalogue_table() -> str:
    """The catalogue as a Markdown table, for the README."""
    head = "| statistic | no. | formula | over | source | cost | bad when |\n|---|---|---|---|---|---|---|"

    def bounds(s: Statistic) -> str:
        said = [f"> {s.threshold:g}"] if s.threshold is not None else []
        if s.alarm is not None and s.alarm != s.threshold:
            said.append(f"alert > {s.alarm:g}")
        elif s.alarm is not None:
            said = [f"alert > {s.alarm:g}"]
        if s.floor is not None:
            said.append(f"alert: x{2.718281828 ** (6 * s.floor):.2g} and 6 robust sigmas off its past")
        return ", ".join(said) or "no bound; compare layers and steps"

    rows = [
        f"| `{s.name}` | {s.number} | {s.formula.replace('|', chr(92) + '|')} | {s.axis} | {s.source} | {s.cost} | "
        f"{bounds(s)} |"
        for s in CATALOGUE.values()
    ]
    return "\n".join([head, *rows])
