"""stabnorm: see what every normalization layer sees, switch LayerNorm to BatchNorm while training, ship without norms.

Nothing heavy is imported until a name is used: TensorBoard loads this package for its tab where torch may be missing.
"""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

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

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm._models.masks": ["valid_tokens"],
        "stabnorm.convert": ["convert_norms"],
        "stabnorm.errors": ["StabNormError"],
        "stabnorm.fold.fold": ["fold_gains", "fold_norms"],
        "stabnorm.fold.guard": ["guard_folds"],
        "stabnorm.fold.manifest": ["apply_manifest"],
        "stabnorm.fold.planned": ["plan_fold"],
        "stabnorm.fold.pre_rms": ["to_pre_rms"],
        "stabnorm.monitor.detect": ["Alert"],
        "stabnorm.monitor.monitor": ["StabilityMonitor"],
        "stabnorm.norms": ["find_norms", "register_norm"],
        "stabnorm.pretrained.remove": ["remove_norms"],
        "stabnorm.recalibrate": ["recalibrate_norms"],
        "stabnorm.switch.progressive": ["ProgressiveSwitch"],
    },
)
