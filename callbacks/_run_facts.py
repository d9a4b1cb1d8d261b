"""What a Trainer tells about a run before it starts, for `ProgressiveNormCallback`. Plain functions that raise or warn.

Classes of Lightning are told by name: each exists twice, once in each namespace.
"""

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from stabnorm.errors import StabNormError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_COPYING = {"WeightAveraging", "StochasticWeightAveraging"}


def steps_of_training(
    trainer: "Trainer", pl_module: "LightningModule", asked: int | None, planned: int | None
) -> tuple[int, int]:
    """Optimizer steps of the training, as `trainer.global_step` counts them: what to plan with, and how many there are.

    Args:
        trainer: at the start of `fit`.
        pl_module: what it trains.
        asked: what the user says; None: what the Trainer knows.
        planned: what the run was planned with before it was interrupted; it stays so.

    Raises:
        ValueError: nobody knows, or the Trainer ends earlier than the user says.
    """
    known = _known_steps(trainer, pl_module)
    total = planned or asked or known
    if total is None:
        why = "the training has no known end" if pl_module.automatic_optimization else "optimization is manual"
        raise ValueError(
            f"the number of optimizer steps is not known beforehand ({why}), so nobody can say when lam has to be 0. "
            "Give Trainer(max_steps=...) or ProgressiveNormCallback(total_steps=...), counted as trainer.global_step "
            "counts: the steps of all optimizers together"
        )
    if asked is not None and known is not None and asked > known:
        raise ValueError(
            f"total_steps={asked}, but the Trainer ends after {known} optimizer steps: lam might not reach 0. Leave "
            "total_steps out, or train longer"
        )
    return total, known or total


def _known_steps(trainer: "Trainer", pl_module: "LightningModule") -> int | None:
    if not pl_module.automatic_optimization:
        # Batches are no measure there: how many optimizer steps one takes is in the user's hands.
        return trainer.max_steps if trainer.max_steps > 0 else None
    estimated = trainer.estimated_stepping_batches
    return int(estimated) if math.isfinite(estimated) and estimated > 0 else None


def refuse_earlier_copies(trainer: "Trainer", pl_module: "LightningModule", mine: Any) -> None:
    """Callbacks that copy the model in their `setup` have to come after the one that converts it.

    Raises:
        StabNormError: one stands before.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set in the Trainer's constructor
        if callback is mine:
            return
        names = {cls.__name__ for cls in type(callback).__mro__}
        copies = (value for value in vars(callback).values() if isinstance(value, nn.Module) and value is not pl_module)
        if names & _COPYING or any(isinstance(value, AveragedModel | type(pl_module)) for value in copies):
            raise StabNormError(
                f"{type(callback).__name__} stands before {type(mine).__name__} in the Trainer's callbacks, so it has "
                f"copied the model before its norms are converted. Put {type(mine).__name__} first"
            )


def refuse_untrained(trainer: "Trainer", pl_module: "LightningModule", norms: Iterable[tuple[str, nn.Module]]) -> None:
    """Every trainable parameter of the converted norms is in an optimizer.

    Raises:
        StabNormError: one is not.
    """
    optimized = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in optimized for p in pl_module.parameters()):
        return  # the strategy has put parameters of its own in their place
    missing = [
        f"{name}.{part}"
        for name, norm in norms
        for part, parameter in norm.named_parameters()
        if parameter.requires_grad and id(parameter) not in optimized
    ]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        raise StabNormError(
            f"{shown} of converted norms are in no optimizer and would stay what they are. Build the optimizer in "
            "configure_optimizers from the model's parameters as they are then (stabnorm.nn.groups.no_decay_groups "
            "does), or leave these layers out with exclude="
        )


def warn_of_early_judges(trainer: "Trainer", end: int) -> None:
    """ModelCheckpoint and EarlyStopping compare models from before the end of the switch with those after it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        names = {cls.__name__ for cls in type(callback).__mro__}
        monitor = getattr(callback, "monitor", None)
        if monitor is None:
            continue
        if "EarlyStopping" in names:
            what = "may end the training before the switch is over. Give it enough patience"
        elif "ModelCheckpoint" in names and getattr(callback, "save_top_k", 1) != 0:
            what = (
                "may choose a model that still holds LayerNorms and does not fold. Keep the last one, too (save_last)"
            )
        else:
            continue
        warnings.warn(
            f"{type(callback).__name__}(monitor={monitor!r}) judges the model before step {end}, where lam is 0: it "
            f"{what}, or log {monitor!r} only from that step on",
            stacklevel=2,
        )
