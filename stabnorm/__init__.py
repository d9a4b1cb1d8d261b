"""stabnorm: see what every normalization layer sees, switch LayerNorm to BatchNorm while training, ship without norms.

Nothing heavy is imported until a name is used: TensorBoard loads this package for its tab where torch may be missing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabnorm._models.masks import valid_tokens as valid_tokens
    from stabnorm.convert import convert_norms as convert_norms
    from stabnorm.errors import StabNormError as StabNormError
    from stabnorm.fold.fold import fold_gains as fold_gains
    from stabnorm.fold.fold import fold_norms as fold_norms
    from stabnorm.fold.guard import guard_folds as guard_folds
    from stabnorm.fold.manifest import apply_manifest as apply_manifest
    from stabnorm.fold.planned import plan_fold as plan_fold
    from stabnorm.fold.pre_rms import to_pre_rms as to_pre_rms
    from stabnorm.monitor.detect import Alert as Alert
    from stabnorm.monitor.monitor import StabilityMonitor as StabilityMonitor
    from stabnorm.norms import find_norms as find_norms
    from stabnorm.norms import register_norm as register_norm
    from stabnorm.pretrained.remove import remove_norms as remove_norms
    from stabnorm.recalibrate import recalibrate_norms as recalibrate_norms
    from stabnorm.switch.progressive import ProgressiveSwitch as ProgressiveSwitch

__version__ = "0.1.0"

_HOME = {
    "Alert": "stabnorm.monitor.detect",
    "ProgressiveSwitch": "stabnorm.switch.progressive",
    "StabNormError": "stabnorm.errors",
    "StabilityMonitor": "stabnorm.monitor.monitor",
    "apply_manifest": "stabnorm.fold.manifest",
    "convert_norms": "stabnorm.convert",
    "find_norms": "stabnorm.norms",
    "fold_gains": "stabnorm.fold.fold",
    "fold_norms": "stabnorm.fold.fold",
    "guard_folds": "stabnorm.fold.guard",
    "plan_fold": "stabnorm.fold.planned",
    "recalibrate_norms": "stabnorm.recalibrate",
    "register_norm": "stabnorm.norms",
    "remove_norms": "stabnorm.pretrained.remove",
    "to_pre_rms": "stabnorm.fold.pre_rms",
    "valid_tokens": "stabnorm._models.masks",
}

__all__ = [
    "Alert",
    "ProgressiveSwitch",
    "StabNormError",
    "StabilityMonitor",
    "apply_manifest",
    "convert_norms",
    "find_norms",
    "fold_gains",
    "fold_norms",
    "guard_folds",
    "plan_fold",
    "recalibrate_norms",
    "register_norm",
    "remove_norms",
    "to_pre_rms",
    "valid_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'stabnorm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
