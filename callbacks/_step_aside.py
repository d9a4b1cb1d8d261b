"""The callback of `STABNORM_AUTO`, which never stops a training that nobody wrote it into."""

from typing import TYPE_CHECKING

from stabnorm._log import logger
from stabnorm.callbacks.stability import StabilityCallback

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class AutoStabilityCallback(StabilityCallback):
    """A `StabilityCallback` that steps aside, and says why, where it has nothing to do.

    It does so beside a `StabilityCallback` of the user's own, and for a model in which there is nothing to watch.
    """

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Register the hooks, or leave the Trainer."""
        callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]  # set in the Trainer's constructor
        own = any(isinstance(other, StabilityCallback) and other is not self for other in callbacks)
        why = "the Trainer has a StabilityCallback already"
        try:
            if not own:
                super().on_fit_start(trainer, pl_module)
                return
        except ValueError as error:
            why = str(error)
        logger.warning("STABNORM_AUTO adds nothing to this training: %s", why)
        self.teardown(trainer, pl_module, "fit")
        self.monitor = None
        # A new list: Lightning is going through the old one.
        trainer.callbacks = [other for other in callbacks if other is not self]  # type: ignore[attr-defined]
