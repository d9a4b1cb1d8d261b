"""`OpenStep`: what a Trainer's callbacks learn of an optimizer step before it is over."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer


class OpenStep:
    """The data of the current optimizer step, from its first batch to the end of the batch in which it is made."""

    def __init__(self, *, open: bool = False) -> None:
        self.open, self.stepped = open, False
        self.loss: Tensor | None = None
        self.loss_again: Callable[[], Tensor | None] | None = None
        self.learning_rate: float | Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self.grad_scales: dict[Optimizer, Tensor | float] = {}
        self.batches = 0  # whose losses are in `loss`

    def add_gradient_norm(self, norm: Tensor | None) -> None:
        """Take in the norm of an optimizer's gradients; the step's is that of all of them."""
        if norm is not None:
            before = self.gradient_norm
            self.gradient_norm = norm if before is None else torch.hypot(before.to(norm), norm)

    def add_loss(self, loss: Tensor, *, alone: bool = False) -> None:
        """Take in the loss of a batch; `loss` is the sum of all.

        Args:
            loss: the loss.
            alone: whether it stands for the step. Default: False.
        """
        self.loss = loss if self.loss is None or alone else self.loss + loss
        self.batches += 1

    def scale_loss(self, divided_by: int) -> None:
        """Make of the sum of losses that were divided by a number the mean of as many as there were."""
        if self.loss is not None and self.batches != divided_by:
            self.loss = self.loss * (divided_by / self.batches)
