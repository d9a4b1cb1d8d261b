"""A: how much of the effect of a norm an affine map per channel cannot reproduce."""

from torch import Tensor

from stabnorm.monitor.past import Moments, Past
from stabnorm.statistic import Statistic

AFFINE_RESIDUAL = "affine_residual"


def _affine_residual(now: Moments, past: Past) -> Tensor:
    del past
    return now.affine_residual


AFFINITY = (
    Statistic(
        AFFINE_RESIDUAL, "A", "1 - mean_c corr_n(x_c, n_c)^2, n the normalised input before gain and bias: the "
        "share of it that no affine map per channel reproduces; 0 for BatchNorm",
        "channel", "1", "ours; below 0.3 a layer could leave LayerNorm", "five passes", _affine_residual,
        needs="normalized",
    ),
)  # fmt: skip
