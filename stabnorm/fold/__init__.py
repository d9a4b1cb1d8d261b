"""Folding: every norm that is affine in eval goes into the weights around it."""

from stabnorm.fold.fold import fold_gains, fold_norms
from stabnorm.fold.folded import FoldedNorm, FrozenAffine
from stabnorm.fold.guard import FoldGuard, guard_folds
from stabnorm.fold.manifest import apply_manifest
from stabnorm.fold.planned import FoldPlan, PlannedNorm, plan_fold
from stabnorm.fold.pre_rms import to_pre_rms
from stabnorm.fold.result import FoldedSite, FoldResult

__all__ = [
    "FoldGuard",
    "FoldPlan",
    "FoldResult",
    "FoldedNorm",
    "FoldedSite",
    "FrozenAffine",
    "PlannedNorm",
    "apply_manifest",
    "fold_gains",
    "fold_norms",
    "guard_folds",
    "plan_fold",
    "to_pre_rms",
]
