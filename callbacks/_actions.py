"""What the actions of `stabnorm.actions` may change in a training of Lightning."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from stabnorm.actions.action import Training
from stabnorm.actions.actions import Actions, resolve_actions
from stabnorm.callbacks._outputs import shared_directory
from stabnorm.callbacks._run_facts import averages
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.switch.progressive import ProgressiveSwitch

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def actions_of(
    trainer: "Trainer", pl_module: "LightningModule", monitor: StabilityMonitor, asked: Mapping[str, Any]
) -> Actions | None:
    """Return the actions for a fit that begins, None if none is asked for; every rank calls this.

    Raises:
        ValueError: this training lacks what an action needs.
    """
    if not any(resolve_actions(asked).values()):
        return None
    strategy = type(trainer.strategy).__name__
    if "DeepSpeed" in strategy:
        raise ValueError(
            f"{strategy} keeps gradients and optimizer to itself, so stabnorm can neither skip a step nor go back. Use "
            "StabilityCallback without actions, or another strategy"
        )
    directory = shared_directory(trainer)

    def save(path: Path) -> None:
        if directory is not None:
            trainer.save_checkpoint(path)

    def stop(reason: str) -> None:
        trainer.should_stop = True

    training = Training(
        pl_module,
        monitor,
        [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Optimizer)],
        schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
        scaler=getattr(trainer.precision_plugin, "scaler", None),
        averages=averages(trainer),
        directory=directory or Path(trainer.default_root_dir),
        save=save,
        stop=stop,
        switch=_Switches(trainer) if _Switches.are_in(trainer) else None,
    )
    return Actions(training, asked)


class _Switches:
    """The switches of the Trainer's callbacks, which are made later than the actions."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer

    @staticmethod
    def are_in(trainer: "Trainer") -> bool:
        """Whether a callback switches norms."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set in the Trainer's constructor
        return any(cls.__name__ == "ProgressiveNormCallback" for one in callbacks for cls in type(one).__mro__)

    def hold(self, steps: int) -> None:
        """Let them wait."""
        callbacks: list[Any] = self._trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            switch = getattr(callback, "switch", None)
            if isinstance(switch, ProgressiveSwitch):
                switch.hold(steps)
