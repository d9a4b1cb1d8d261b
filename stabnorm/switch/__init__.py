"""From LayerNorm to RepBN while a model trains: schedules, the gate, lam, and `ProgressiveSwitch` over them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabnorm.switch.branch_gap import BranchGap as BranchGap
    from stabnorm.switch.gate import AffineGate as AffineGate
    from stabnorm.switch.lam import progressive_norms as progressive_norms
    from stabnorm.switch.lam import running_norms as running_norms
    from stabnorm.switch.lam import write_lam as write_lam
    from stabnorm.switch.lam import write_loss_scale as write_loss_scale
    from stabnorm.switch.lam import write_step as write_step
    from stabnorm.switch.progressive import ProgressiveSwitch as ProgressiveSwitch
    from stabnorm.switch.schedules import make_schedule as make_schedule

_HOME = {  # a name is imported at its first use: schedules and gate load where torch is missing
    "AffineGate": "gate",
    "BranchGap": "branch_gap",
    "ProgressiveSwitch": "progressive",
    "make_schedule": "schedules",
    "progressive_norms": "lam",
    "running_norms": "lam",
    "write_lam": "lam",
    "write_loss_scale": "lam",
    "write_step": "lam",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'stabnorm.switch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stabnorm.switch.{_HOME[name]}"), name)
