"""The affine map that comes closest to a trained norm: measure the norms of a model, and fit their successors."""

from stabnorm.fit.fit import fit_norms
from stabnorm.fit.measure import Measure, measure_norms
from stabnorm.fit.sums import Affine
from stabnorm.fit.watch import Runner

__all__ = ["Affine", "Measure", "Runner", "fit_norms", "measure_norms"]
