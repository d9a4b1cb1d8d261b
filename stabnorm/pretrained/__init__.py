"""Remove LayerNorm from a trained model: `remove_norms`, and its stages to measure, fit, repair and decide."""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.fit.fit import fit_norms as fit_norms
    from stabnorm.fit.measure import Measure as Measure
    from stabnorm.fit.measure import measure_norms as measure_norms
    from stabnorm.fit.sums import Affine as Affine
    from stabnorm.fit.watch import Runner as Runner
    from stabnorm.pretrained.remove import RemovalResult as RemovalResult
    from stabnorm.pretrained.remove import RemovedNorm as RemovedNorm
    from stabnorm.pretrained.remove import remove_norms as remove_norms
    from stabnorm.pretrained.repair import Recipe as Recipe
    from stabnorm.pretrained.repair import Repair as Repair
    from stabnorm.pretrained.repair import relative_error as relative_error
    from stabnorm.pretrained.repair import repair_norms as repair_norms

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.fit.fit": ["fit_norms"],
        "stabnorm.fit.measure": ["Measure", "measure_norms"],
        "stabnorm.fit.sums": ["Affine"],
        "stabnorm.fit.watch": ["Runner"],
        "stabnorm.pretrained.remove": ["RemovalResult", "RemovedNorm", "remove_norms"],
        "stabnorm.pretrained.repair": ["Recipe", "Repair", "relative_error", "repair_norms"],
    },
)
