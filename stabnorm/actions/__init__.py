"""What is done at an alarm: skip the step, save a checkpoint, clip, reduce the learning rate, go back, stop."""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.actions.action import Action as Action
    from stabnorm.actions.action import OutOfBudget as OutOfBudget
    from stabnorm.actions.action import Training as Training
    from stabnorm.actions.action import Why as Why
    from stabnorm.actions.action import Worker as Worker
    from stabnorm.actions.actions import Actions as Actions
    from stabnorm.actions.checkpoint import Checkpoint as Checkpoint
    from stabnorm.actions.clip import Clip as Clip
    from stabnorm.actions.hold_switch import HoldSwitch as HoldSwitch
    from stabnorm.actions.qk_clip import QKClip as QKClip
    from stabnorm.actions.reduce_lr import ReduceLR as ReduceLR
    from stabnorm.actions.reduce_lr import scale_learning_rates as scale_learning_rates
    from stabnorm.actions.rollback import Rollback as Rollback
    from stabnorm.actions.skip import Skip as Skip
    from stabnorm.actions.snapshot import Snapshot as Snapshot
    from stabnorm.actions.stop import Stop as Stop
    from stabnorm.clipping import AdaptiveClip as AdaptiveClip

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.actions.action": ["Action", "OutOfBudget", "Training", "Why", "Worker"],
        "stabnorm.actions.actions": ["Actions"],
        "stabnorm.actions.checkpoint": ["Checkpoint"],
        "stabnorm.actions.clip": ["Clip"],
        "stabnorm.actions.hold_switch": ["HoldSwitch"],
        "stabnorm.actions.qk_clip": ["QKClip"],
        "stabnorm.actions.reduce_lr": ["ReduceLR", "scale_learning_rates"],
        "stabnorm.actions.rollback": ["Rollback"],
        "stabnorm.actions.skip": ["Skip"],
        "stabnorm.actions.snapshot": ["Snapshot"],
        "stabnorm.actions.stop": ["Stop"],
        "stabnorm.clipping": ["AdaptiveClip"],
    },
)
