"""What several callbacks need of a Trainer and Lightning, 2.2 to 2.6, has no public name for; how they are pickled."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from stabnorm.callbacks._lightning import Callback

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def logged_steps(trainer: "Trainer") -> int:
    """Steps done as the loggers' x axis counts them; final once the first batch begins.

    ``trainer.global_step`` counts the steps of all optimizers. Lightning's own callbacks read this attribute, too.
    """
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def loss_scale(trainer: "Trainer") -> Tensor | float | None:
    """What the loss is multiplied by; None without a loss scaler.

    It is the scaler's own tensor once there is one, for `get_scale()` would wait for the device.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None
    scale = getattr(scaler, "_scale", None)
    return scale if isinstance(scale, Tensor) else float(scaler.get_scale())


def synchronises_norms(trainer: "Trainer") -> bool:
    """Whether the user asked for ``Trainer(sync_batchnorm=True)``."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def state_to_pickle(callback: Callback, **replaced: Any) -> dict[str, Any]:
    """A callback's attributes, with these in the place of what belongs to one run.

    The Trainer sets bound methods of the module on every callback, and pickling them would pickle the model.
    """
    state = callback.__dict__ | replaced
    return {name: value for name, value in state.items() if name not in ("log", "log_dict")}
