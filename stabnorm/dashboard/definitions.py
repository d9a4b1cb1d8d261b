"""What each statistic is called in plain words, and its definition, without torch.

The catalogue computes with torch, which may be missing where a dashboard runs. So the facts that a page shows are
kept in `definitions.json`. A run of this file, `python -m stabnorm.dashboard.definitions`, writes them again from the
catalogue, and a test compares the two.
"""

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

# What the page calls a statistic. The catalogue's own name stands beside it.
PLAIN_NAMES: Mapping[str, str] = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "tokens": "valid tokens",
    "lam": "share of LayerNorm (lam)",
    "branch_gap": "gap of the two branches",
    "running_mean_distance": "batch mean to running mean",
    "running_var_distance": "batch variance to running variance",
    "mean_discrepancy": "batch against running mean",
    "var_discrepancy": "batch against running scale",
    "mean_fluctuation": "fluctuation of the mean",
    "var_fluctuation": "change of variance per step",
    "absmax_fluctuation": "change of the largest value per step",
    "scale_jump": "jump of the input scale",
    "am_gm_ratio": "bursts of scale",
    "rank_share": "difference between processes",
    "effective_samples": "independent tokens",
    "token_std_mean": "input scale",
    "token_std_min": "input scale, smallest token",
    "token_std_max": "input scale, largest token",
    "token_mean_mean": "input mean",
    "token_mean_min": "input mean, smallest token",
    "token_mean_max": "input mean, largest token",
    "eps_share": "share below eps",
    "headroom": "doublings left in its dtype",
    "headroom_fp16": "doublings left in float16",
    "nonfinite_count": "NaN and infinite elements",
    "zero_share": "share of zeros",
    "depth_ratio": "scale against the layer before",
    "depth_growth_rate": "growth over depth, rate",
    "depth_growth_shape": "growth over depth, shape",
    "amax": "largest input",
    "crest": "largest input / scale",
    "channel_spread": "spread of the channels",
    "massive_activation": "massive activation",
    "massive_channels": "channels with massive activations",
    "max_to_median": "largest / median of a token",
    "feature_kurtosis": "outlier channels (kurtosis)",
    "token_kurtosis": "outliers in a token (kurtosis)",
    "outlier_dims": "outlier channels",
    "outlier_dims_deep": "outlier channels over depth",
    "outlier_overlap": "outlier channels kept",
    "new_outlier_share": "new outlier channels",
    "affine_residual": "affine residual",
    "grad_gain": "gradient at the gain",
    "grad_shift": "gradient at the bias",
    "grad_fluctuation": "fluctuation of the gradient",
    "gradient_spike": "gradient spike",
    "gain_spread": "spread of the gains",
    "gain_near_zero": "gains near zero",
    "gain_sign_flips": "gains that changed sign",
    "bias_drift": "drift of the bias",
    "dead_gains": "gains without gradient",
    "mx_last_bin": "gains in the last bin of a microscaling format",
    "adam_staleness": "staleness of Adam's second moment",
    "gradient_to_eps": "gradient against Adam's eps",
    "attention_entropy": "attention entropy",
    "attention_entropy_share": "attention entropy, share of the largest",
    "attention_logit_max": "largest attention logit",
    "update_ratio": "update / weight",
    "angular_update": "turn of the weights",
    "radial_share": "radial share of the update",
    "effective_learning_rate": "effective learning rate",
    "weight_norm": "norm of the weights",
    "top_singular_value": "largest singular value",
    "token_embedding_variability": "variability of the embeddings",
    "embedding_gradient_ratio": "gradient of the embedding / the others",
    "output_logit_mean": "mean output logit",
    "output_logit_max": "largest output logit",
    "output_log_z": "log of the softmax's sum",
    "output_z_loss": "z-loss",
    "update_curvature": "curvature along the update",
    "lasting_curvature": "curvature along the update, third largest of four",
    "switch_readiness": "readiness for the switch",
    "switch_gap": "gap of the two branches",
    "nonfinite": "NaN or infinite input",
}


class Definition(NamedTuple):
    """What a page says about a statistic.

    Attributes:
        plain: its name in plain words; the catalogue's name if there is no other.
        formula: its formula, in words and symbols.
        unit: its unit, "1" for a plain number.
        axis: what it is taken over, see `stabnorm.statistic.Statistic`.
        bad_when: its bounds, in words.
        floor: the smallest scale of its robust z-score, in log units; None if it is not watched.
        threshold: a value above it is bad; None if there is no such bound.
        least: a value below it is bad; None if there is no such bound.
        advice: what a value beyond the bound means, and where to look.
    """

    plain: str
    formula: str = ""
    unit: str = "1"
    axis: str = "layer"
    bad_when: str = ""
    floor: float | None = None
    threshold: float | None = None
    least: float | None = None
    advice: str = ""


@functools.cache
def _of_catalogue() -> dict[str, dict[str, Any]]:
    text = files("stabnorm.dashboard").joinpath("definitions.json").read_text(encoding="utf-8")
    known: dict[str, dict[str, Any]] = json.loads(text)
    return known


def definition(name: str) -> Definition:
    """Return what is known of a statistic; of one of your own only its name is known.

    Example:
        >>> definition("token_std_mean").plain, definition("token_std_mean").floor, definition("my_own").plain
        ('input scale', 0.05, 'my_own')
    """
    return Definition(PLAIN_NAMES.get(name, name), **_of_catalogue().get(name, {}))


def from_catalogue() -> str:
    """Return the text of `definitions.json`, made from the catalogue and the companions; needs torch."""
    from stabnorm.companions.names import known_companions
    from stabnorm.monitor.statistics import CATALOGUE

    statistics = [*CATALOGUE.values(), *(s for kind in known_companions().values() for s in kind.statistics)]
    facts = {
        s.name: {
            "formula": s.formula,
            "unit": s.unit,
            "axis": s.axis,
            "bad_when": s.bad_when,
            "floor": s.floor,
            "threshold": s.threshold if s.threshold is not None else s.alarm,
            "least": s.least,
            "advice": s.advice,
        }
        for s in statistics
    }
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("definitions.json").write_text(from_catalogue(), encoding="utf-8")
