"""Switch a model from LayerNorm to RepBN while it trains: schedules, the gate, lam, and `ProgressiveSwitch`."""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.companions.switching import BranchGap as BranchGap
    from stabnorm.switch.anchor import ScaleAnchor as ScaleAnchor
    from stabnorm.switch.gate import AffineGate as AffineGate
    from stabnorm.switch.lam import progressive_norms as progressive_norms
    from stabnorm.switch.lam import running_norms as running_norms
    from stabnorm.switch.lam import write_lam as write_lam
    from stabnorm.switch.lam import write_loss_scale as write_loss_scale
    from stabnorm.switch.lam import write_step as write_step
    from stabnorm.switch.progressive import ProgressiveSwitch as ProgressiveSwitch
    from stabnorm.switch.schedules import make_schedule as make_schedule

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {  # schedules and gate load where torch is missing
        "stabnorm.companions.switching": ["BranchGap"],
        "stabnorm.switch.anchor": ["ScaleAnchor"],
        "stabnorm.switch.gate": ["AffineGate"],
        "stabnorm.switch.lam": ["progressive_norms", "running_norms", "write_lam", "write_loss_scale", "write_step"],
        "stabnorm.switch.progressive": ["ProgressiveSwitch"],
        "stabnorm.switch.schedules": ["make_schedule"],
    },
)
