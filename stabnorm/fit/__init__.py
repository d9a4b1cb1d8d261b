"""The affine map that comes closest to a trained norm: measure the norms of a model, and fit their successors."""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.fit.fit import fit_norms as fit_norms
    from stabnorm.fit.measure import Measure as Measure
    from stabnorm.fit.measure import measure_norms as measure_norms
    from stabnorm.fit.sums import Affine as Affine
    from stabnorm.fit.watch import Runner as Runner

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.fit.fit": ["fit_norms"],
        "stabnorm.fit.measure": ["Measure", "measure_norms"],
        "stabnorm.fit.sums": ["Affine"],
        "stabnorm.fit.watch": ["Runner"],
    },
)
