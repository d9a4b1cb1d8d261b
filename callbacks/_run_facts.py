"""Functions that ask a Trainer about its run; some of them raise an error or warn.

Classes of Lightning are recognised by name, because each one exists twice, once in each namespace.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from stabnorm.errors import StabNormError
from stabnorm.nn._progressive import ProgressiveNorm

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_COPYING = {"WeightAveraging", "StochasticWeightAveraging"}


def steps_of_training(
    trainer: "Trainer", pl_module: "LightningModule", asked: int | None, planned: int | None
) -> tuple[int, int]:
    """Return the optimizer steps to plan with, and those of this training, as `trainer.global_step` counts them.

    Args:
        trainer: the Trainer, at the start of `fit`.
        pl_module: the module that it trains.
        asked: the number that the user gave; None uses the Trainer's.
        planned: the number with which the run was planned before it was interrupted; it takes precedence.

    Raises:
        ValueError: the number is not known, or the Trainer ends earlier than the user says.
    """
    known = _known_steps(trainer, pl_module)
    total = next((steps for steps in (planned, asked, known) if steps is not None), None)
    if total is None:
        why = "the training has no known end" if pl_module.automatic_optimization else "optimization is manual"
        raise ValueError(
            f"the number of optimizer steps is not known beforehand ({why}), so nobody can say when lam has to be 0. "
            "Give Trainer(max_steps=...) or ProgressiveNormCallback(total_steps=...), counted as trainer.global_step "
            "counts: the steps of all optimizers together"
        )
    if asked is not None and known and asked > known:
        raise ValueError(
            f"total_steps={asked}, but the Trainer ends after {known} optimizer steps: lam might not reach 0. Leave "
            "total_steps out, or train longer"
        )
    return total, total if known is None else known


def _known_steps(trainer: "Trainer", pl_module: "LightningModule") -> int | None:
    if not pl_module.automatic_optimization:
        # With manual optimization the user decides how many optimizer steps a batch takes.
        return trainer.max_steps if trainer.max_steps >= 0 else None
    if trainer.limit_train_batches == 0:
        return 0
    estimated = trainer.estimated_stepping_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if any(cls.__name__ == "GradientAccumulationScheduler" for cls in type(callback).__mro__):
            estimated = _accumulated_steps(trainer, callback, estimated)
    return int(estimated) if math.isfinite(estimated) and estimated >= 0 else None


def _accumulated_steps(trainer: "Trainer", scheduler: Any, estimated: float) -> float:
    """Return the number of steps, because Lightning's estimate assumes that every epoch is like the first one."""
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is None or epochs < 0 or not math.isfinite(batches):
        return estimated
    steps: float = sum(math.ceil(batches / scheduler.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)


def refuse_earlier_copies(trainer: "Trainer", pl_module: "LightningModule", converting: Any) -> None:
    """Check that callbacks which copy the model in their `setup` come after the one that converts it.

    Raises:
        StabNormError: one comes before it.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set in the Trainer's constructor
        if callback is converting:
            return
        names = {cls.__name__ for cls in type(callback).__mro__}
        copies = (value for value in vars(callback).values() if isinstance(value, nn.Module) and value is not pl_module)
        if names & _COPYING or any(isinstance(value, AveragedModel | type(pl_module)) for value in copies):
            raise StabNormError(
                f"{type(callback).__name__} stands before {type(converting).__name__} in the Trainer's callbacks, so "
                f"it has copied the model before its norms are converted. Put {type(converting).__name__} first"
            )


def refuse_other_checkpoint(trainer: "Trainer", pl_module: "LightningModule", checkpoint: Mapping[str, Any]) -> None:
    """Check that a run resumes from a checkpoint of a run with the switch, whose optimizer knows all parameters.

    Raises:
        StabNormError: no norm in the checkpoint was converted.
    """
    lams = [f"{name}.lam" for name, module in pl_module.named_modules() if isinstance(module, ProgressiveNorm)]
    resumes = trainer.state.fn == "fit" and checkpoint.get("optimizer_states")
    if resumes and lams and not any(lam in checkpoint["state_dict"] for lam in lams):
        raise StabNormError(
            "the checkpoint is of a training without the switch, and its optimizer states are without the parameters "
            "that conversion adds. Fine-tune from its weights: load them into the model (load_from_checkpoint, say), "
            "and call fit without ckpt_path"
        )


def refuse_lost_conversion(trainer: "Trainer") -> None:
    """Check that the conversion is not lost in a spawned process, which only sends tensors back.

    Raises:
        StabNormError: the Trainer's strategy spawns its processes.
    """
    launcher = trainer.strategy.launcher
    if any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(launcher).__mro__):
        raise StabNormError(
            "this strategy (ddp_spawn, ddp_fork or ddp_notebook) trains copies of the model in other processes, and "
            "the norms were converted there only: afterwards the model of the caller would have the weights of a "
            "switched model and LayerNorms. Call stabnorm.convert_norms(model) yourself before fit, in the model's "
            "__init__, say, or use strategy='ddp'"
        )


def averages(trainer: "Trainer") -> list[nn.Module]:
    """Return the averaged models that callbacks hold (WeightAveraging, EMAWeightAveraging)."""
    return [
        value.module
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        for value in vars(callback).values()
        if isinstance(value, AveragedModel)
    ]


def refuse_untrained(trainer: "Trainer", pl_module: "LightningModule", norms: Iterable[tuple[str, nn.Module]]) -> None:
    """Check that every trainable parameter of the converted norms is in an optimizer.

    Raises:
        StabNormError: a parameter is in none.
    """
    optimized = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in optimized for p in pl_module.parameters()):
        return  # the strategy has replaced the parameters by its own
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
    """Warn of ModelCheckpoint and EarlyStopping, which compare models before the end of the switch with later ones."""
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
