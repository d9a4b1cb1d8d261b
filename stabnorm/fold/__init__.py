"""Folding: every norm that is affine in eval goes into the weights around it."""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.fold.fold import fold_gains as fold_gains
    from stabnorm.fold.fold import fold_norms as fold_norms
    from stabnorm.fold.folded import FoldedNorm as FoldedNorm
    from stabnorm.fold.folded import FrozenAffine as FrozenAffine
    from stabnorm.fold.guard import FoldGuard as FoldGuard
    from stabnorm.fold.guard import guard_folds as guard_folds
    from stabnorm.fold.manifest import apply_manifest as apply_manifest
    from stabnorm.fold.planned import FoldPlan as FoldPlan
    from stabnorm.fold.planned import PlannedNorm as PlannedNorm
    from stabnorm.fold.planned import plan_fold as plan_fold
    from stabnorm.fold.pre_rms import to_pre_rms as to_pre_rms
    from stabnorm.fold.result import FoldedSite as FoldedSite
    from stabnorm.fold.result import FoldResult as FoldResult

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.fold.fold": ["fold_gains", "fold_norms"],
        "stabnorm.fold.folded": ["FoldedNorm", "FrozenAffine"],
        "stabnorm.fold.guard": ["FoldGuard", "guard_folds"],
        "stabnorm.fold.manifest": ["apply_manifest"],
        "stabnorm.fold.planned": ["FoldPlan", "PlannedNorm", "plan_fold"],
        "stabnorm.fold.pre_rms": ["to_pre_rms"],
        "stabnorm.fold.result": ["FoldResult", "FoldedSite"],
    },
)
