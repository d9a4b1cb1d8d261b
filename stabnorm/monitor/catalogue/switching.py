"""A and A1: whether a layer could leave its norm, and how far a layer on its way is."""

import torch
from torch import Tensor

from stabnorm.switch.gate import HOLD_ABOVE, RUN_BELOW
from stabnorm.monitor.detailed import DetailedMoments, DetailedPast
from stabnorm.monitor.past import Moments, Past
from stabnorm.statistic import Statistic


def _affine_residual(now: Moments, past: Past) -> Tensor:
    del past
    return now.affine_residual


def _switch_readiness(now: Moments, past: DetailedPast) -> Tensor:
    return ((HOLD_ABOVE - past.residual_with(now)) / (HOLD_ABOVE - RUN_BELOW)).clamp(0, 1)


def _switch_gap(now: DetailedMoments, past: Past) -> Tensor:
    del past
    return torch.as_tensor(now.branch_gap)


SWITCHING = (
    Statistic(
        "affine_residual", "A", "1 - mean_c corr_n(x_c, n_c)^2, n the normalised input before gain and bias: what no "
        "affine map per channel reproduces; 0 for BatchNorm",
        "channel", "1", "ours; below 0.3 a layer could leave LayerNorm", "five passes", _affine_residual,
        needs="normalized",
    ),
    Statistic(
        "switch_readiness", "A", f"({HOLD_ABOVE:g} - A) / ({HOLD_ABOVE:g} - {RUN_BELOW:g}) between 0 and 1, A the "
        "moving average of affine_residual (momentum 0.1): 1 where the adaptive switch would run the layer, 0 where it "
        "would hold it",
        "channel", "1", "ours", "five passes", _switch_readiness, needs="normalized", remembers=True,
    ),
    Statistic(
        "switch_gap", "A1", "||norm(x) - RepBN(x)|| / ||norm(x)|| of a PRepBN, at every 4th step: what a step of lam "
        "moves; no sign of health; NaN in between, elsewhere, and in a compiled model",
        "layer", "1", "SLAB, arXiv 2405.11582", "both branches once more, at every 4th step", _switch_gap,
        needs="branches",
    ),
)  # fmt: skip
