"""Access to attributes of a Trainer that have no public name in Lightning 2.2 to 2.6; and how callbacks are pickled."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stabnorm._checks import shown
from stabnorm.callbacks._lightning import Callback
from stabnorm.callbacks._optimizers import scale_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def described(callback: Callback, **arguments: Any) -> str:
    """Return the call that builds a callback, with the arguments that are not at their default.

    Args:
        callback: the callback; its attributes are arguments by name.
        **arguments: those that it keeps under another name.
    """
    values = vars(callback) | arguments
    arguments = {
        name: values[name]
        for name, parameter in inspect.signature(type(callback)).parameters.items()
        if name in values and repr(values[name]) != repr(parameter.default)
    }
    return f"{type(callback).__name__}({', '.join(f'{name}={shown(value)}' for name, value in arguments.items())})"


def logged_steps(trainer: "Trainer") -> int:
    """Return the number of steps as on the loggers' x axis; it is correct once the first batch begins.

    ``trainer.global_step`` counts the steps of all optimizers instead. Lightning's own callbacks also read this
    attribute.
    """
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def loss_scale(trainer: "Trainer") -> Tensor | float | None:
    """Return the factor by which the loss is scaled; None without a loss scaler."""
    return scale_of(getattr(trainer.precision_plugin, "scaler", None))


def check_loss_again(pl_module: "LightningModule") -> None:
    """Check that `loss_again` will be able to compute the loss.

    Raises:
        ValueError: the module steps its optimizers in `training_step`.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{type(pl_module).__name__} has automatic_optimization=False, so its training_step steps the optimizers, "
            "and the companion 'curvature' cannot run it once more. Leave this companion out"
        )


def loss_again(
    trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
) -> Callable[[], Tensor | None]:
    """Return a function that runs `training_step` on a batch once more, in the Trainer's precision; it logs nothing.

    The batch's own containers are copied now, because a `training_step` may take something out of them.
    """
    contents = copy.copy(batch)
    parameters = inspect.signature(pl_module.training_step).parameters
    takes_index = len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())

    def loss() -> Any:
        arguments = (copy.copy(contents), batch_idx) if takes_index else (copy.copy(contents),)
        attributes: dict[str, Any] = vars(pl_module)
        kept: dict[str, Any] = {name: attributes[name] for name in ("log", "log_dict") if name in attributes}
        attributes["log"] = attributes["log_dict"] = _log_nothing
        try:
            with trainer.precision_plugin.train_step_context():
                output: Any = pl_module.training_step(*arguments)
        finally:
            for name in ("log", "log_dict"):
                del attributes[name]
            attributes.update(kept)
        return output["loss"] if isinstance(output, Mapping) else output

    return loss


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for `LightningModule.log` and `log_dict`."""


def synchronises_norms(trainer: "Trainer") -> bool:
    """Whether the user asked for ``Trainer(sync_batchnorm=True)``."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def state_to_pickle(callback: Callback, **replaced: Any) -> dict[str, Any]:
    """Return a callback's attributes for pickle, with replacements for those that belong to one run.

    The Trainer sets bound methods of the module on every callback. They are left out, because they would pickle the
    model.
    """
    state = callback.__dict__ | replaced
    return {name: value for name, value in state.items() if name not in ("log", "log_dict")}
