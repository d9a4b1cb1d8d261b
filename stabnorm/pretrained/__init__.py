"""Remove LayerNorm from a trained model: `remove_norms`, and its stages to measure, fit, repair and decide."""

from stabnorm.fit.fit import fit_norms
from stabnorm.fit.measure import Measure, measure_norms
from stabnorm.fit.sums import Affine
from stabnorm.fit.watch import Runner
from stabnorm.pretrained.remove import RemovalResult, RemovedNorm, remove_norms
from stabnorm.pretrained.repair import Recipe, Repair, relative_error, repair_norms

__all__ = [
    "Affine",
    "Measure",
    "Recipe",
    "RemovalResult",
    "RemovedNorm",
    "Repair",
    "Runner",
    "fit_norms",
    "measure_norms",
    "relative_error",
    "remove_norms",
    "repair_norms",
]
