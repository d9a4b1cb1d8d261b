"""`OpenStep`: what a Trainer's callbacks learn of an optimizer step before it is over."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class OpenStep:
    """The data of the current optimizer step, from its first batch to the end of the batch in which it is made."""

    def __init__(self, *, open: bool = False) -> None:
        self.open, self.stepped = open, False
        self.loss: Tensor | None = None
        self.loss_again: Callable[[], Tensor | None] | None = None
        self.learning_rate: float | Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self.grad_scales: dict[Optimizer, Tensor | float] = {}
        self._batches = 0

    def add_gradient_norm(self, norm: Tensor | None) -> None:
        """Take in the norm of an optimizer's gradients; the step's is that of all of them."""
        if norm is not None:
            before = self.gradient_norm
            self.gradient_norm = norm if before is None else torch.hypot(before.to(norm), norm)

    def add_loss(self, loss: Tensor, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Take in the loss of a batch; the step's is the mean of its batches, with manual optimization the last one."""
        if self.loss is None or not pl_module.automatic_optimization:
            self.loss = loss
        else:
            self.loss = self.loss + loss
        self._batches += 1
        if self.stepped and pl_module.automatic_optimization and self._batches != trainer.accumulate_grad_batches:
            # Lightning has divided by as many batches as it wanted to accumulate, but the epoch was over before.
            self.loss = self.loss * (trainer.accumulate_grad_batches / self._batches)
