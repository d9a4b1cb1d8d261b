"""`repair_module`: a Lightning Trainer carries out a repair, with its precision, strategies and checkpoints."""

import functools
from typing import Any, cast

from pytorch_lightning import LightningModule
from torch import Tensor

from stabnorm._checks import check_instance, wrong_type
from stabnorm._models.devices import device_of
from stabnorm.pretrained.repair import Repair


def repair_module(repair: Repair, base: type[Any] = LightningModule) -> LightningModule:
    """Give a LightningModule for a Trainer to fit; afterwards `repair.model` is repaired.

    Give the Trainer ``max_steps=repair.steps``. Precision and accumulation are the Trainer's, not the recipe's. Its
    checkpoints hold the converted model, and a fit that resumes from one continues where it was.

    Args:
        repair: not begun yet.
        base: the LightningModule class of the Trainer's own package. Default: pytorch_lightning's.

    Example:
        >>> import logging, torch
        >>> from pytorch_lightning import Trainer
        >>> from torch.utils.data import DataLoader
        >>> from stabnorm import convert_norms
        >>> from stabnorm.callbacks import repair_module
        >>> from stabnorm.pretrained import Repair, Runner, fit_norms
        >>> build = lambda: torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)).eval()
        >>> original, model, batches = build(), build(), [torch.randn(8, 4) for _ in range(4)]
        >>> _ = model.load_state_dict(original.state_dict()), convert_norms(model)
        >>> _ = fit_norms(model, original, batches, [["0"]], Runner())
        >>> module = repair_module(Repair(model, original, steps=4))
        >>> quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        >>> trainer = Trainer(max_steps=4, enable_checkpointing=False, accelerator="cpu", **quiet)
        >>> trainer.fit(module, DataLoader(batches, batch_size=None))
        >>> module.repair.steps_done
        4
    """
    check_instance("repair", repair, Repair, "a Repair")
    if not (isinstance(base, type) and hasattr(base, "configure_gradient_clipping")):
        raise wrong_type("base", base, "the LightningModule class of the Trainer's package")
    return cast(LightningModule, _over(base)(repair))  # type: ignore[arg-type]


@functools.cache
def _over(base: type[Any]) -> type[Any]:
    return type("NormRepair", (_RepairHooks, base), {"__module__": __name__, "__doc__": _RepairHooks.__doc__})


class _RepairHooks:
    """Thin hooks over a `Repair`; the converted model is its only child."""

    repair: Repair

    def __init__(self, repair: Repair) -> None:
        super().__init__()
        self.repair = repair
        self.model = repair.model  # as a child it is moved, saved and loaded; the original is not

    def on_fit_start(self) -> None:
        """Move the original to the model's device.

        Raises:
            ValueError: the Trainer ends at another step than the repair.
        """
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        if trainer.max_steps != self.repair.steps and not trainer.fast_dev_run:
            raise ValueError(
                f"the Trainer has max_steps={trainer.max_steps}, and the repair takes {self.repair.steps} steps. Give "
                "both the same number"
            )
        self.repair.original.to(device_of(self.repair.model))
        self.repair.model.train()  # Lightning warns of eval mode; `training_step` switches to it

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the repair's loss."""
        module: Any = self
        self.repair.model.eval()
        self.repair.begin(module.global_step)
        loss = self.repair.loss(batch)
        module.log("repair/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Give the repair's optimizer, and its schedule, which moves at each step."""
        return {
            "optimizer": self.repair.optimizer,
            "lr_scheduler": {"scheduler": self.repair.schedule, "interval": "step"},
        }

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as the Trainer says, or else as the recipe does."""
        module: Any = self
        module.clip_gradients(
            optimizer,
            gradient_clip_val=self.repair.recipe.clip if gradient_clip_val is None else gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm or "norm",
        )

    def on_train_end(self) -> None:
        """Set lam to 0 in the end."""
        self.repair.steps_done = int(self.global_step)  # type: ignore[attr-defined]
        self.repair.finish()
