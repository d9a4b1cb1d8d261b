"""stabnorm: see what every normalization layer sees, switch LayerNorm to BatchNorm while training, ship without norms.

Nothing heavy is imported until a name is used: TensorBoard loads this package for its tab where torch may be missing.
"""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm import actions as actions
    from stabnorm import callbacks as callbacks
    from stabnorm import companions as companions
    from stabnorm import dashboard as dashboard
    from stabnorm import fit as fit
    from stabnorm import fold as fold
    from stabnorm import functional as functional
    from stabnorm import monitor as monitor
    from stabnorm import nn as nn
    from stabnorm import norms as norms
    from stabnorm import ops as ops
    from stabnorm import pretrained as pretrained
    from stabnorm import recorder as recorder
    from stabnorm import remedies as remedies
    from stabnorm import switch as switch
    from stabnorm._models.masks import valid_tokens as valid_tokens
    from stabnorm.convert import convert_norms as convert_norms
    from stabnorm.errors import StabNormError as StabNormError
    from stabnorm.fold.fold import fold_gains as fold_gains
    from stabnorm.fold.fold import fold_norms as fold_norms
    from stabnorm.fold.guard import guard_folds as guard_folds
    from stabnorm.fold.manifest import apply_manifest as apply_manifest
    from stabnorm.fold.planned import plan_fold as plan_fold
    from stabnorm.fold.pre_rms import to_pre_rms as to_pre_rms
    from stabnorm.monitor.alerts import Alert as Alert
    from stabnorm.monitor.monitor import StabilityMonitor as StabilityMonitor
    from stabnorm.monitor.onsets import Onset as Onset
    from stabnorm.monitor.record import FileRecord as FileRecord
    from stabnorm.monitor.record import read_record as read_record
    from stabnorm.norms import find_norms as find_norms
    from stabnorm.norms import register_norm as register_norm
    from stabnorm.pretrained.remove import remove_norms as remove_norms
    from stabnorm.pretrained.repair import Recipe as Recipe
    from stabnorm.recalibrate import recalibrate_norms as recalibrate_norms
    from stabnorm.statistic import Statistic as Statistic
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
        "stabnorm.monitor.alerts": ["Alert"],
        "stabnorm.monitor.monitor": ["StabilityMonitor"],
        "stabnorm.monitor.onsets": ["Onset"],
        "stabnorm.monitor.record": ["FileRecord", "read_record"],
        "stabnorm.norms": ["find_norms", "register_norm"],
        "stabnorm.pretrained.remove": ["remove_norms"],
        "stabnorm.pretrained.repair": ["Recipe"],
        "stabnorm.recalibrate": ["recalibrate_norms"],
        "stabnorm.statistic": ["Statistic"],
        "stabnorm.switch.progressive": ["ProgressiveSwitch"],
    },
    parts=(
        "actions", "callbacks", "companions", "dashboard", "fit", "fold", "functional", "monitor", "nn", "norms", "ops",
        "pretrained", "recorder", "remedies", "switch",
    ),
)  # fmt: skip
