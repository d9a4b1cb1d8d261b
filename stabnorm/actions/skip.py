"""`Skip`: leave a step out before it does harm."""

import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._checks import check_count
from stabnorm.actions.action import Action, OutOfBudget, Training, Why, Worker
from stabnorm.norms import find_norms


class NormBuffers:
    """Copies of the buffers that norms change in a forward, such as the running statistics of a BatchNorm.

    Args:
        model: the model.

    >>> norm = nn.BatchNorm1d(2)
    >>> buffers = NormBuffers(norm)
    >>> buffers.keep()
    >>> _ = norm(torch.full((3, 2), torch.nan))
    >>> buffers.restore()
    >>> norm.running_mean, int(norm.num_batches_tracked)
    (tensor([0., 0.]), 0)
    """

    def __init__(self, model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what looks like a norm was named when the monitor was made
            norms = [norm.module for norm in find_norms(model)]
        norms += [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
        inside = {module: None for norm in norms for module in norm.modules()}
        self._places = [
            (module, name) for module in inside for name, value in module._buffers.items() if value is not None
        ]
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers as they are now."""
        now = self._now()
        if [(b.shape, b.device, b.dtype) for b in now] != [(b.shape, b.device, b.dtype) for b in self._copies]:
            self._copies = [buffer.detach().clone() for buffer in now]
        elif now:
            torch._foreach_copy_(self._copies, now)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the buffers the values that they had at the last `keep`."""
        if self._copies:
            torch._foreach_copy_(self._now(), self._copies)

    def _now(self) -> list[Tensor]:
        return [buffer for module, name in self._places if (buffer := module._buffers[name]) is not None]


@dataclass(frozen=True)
class Skip(Action):
    """Leaves a step out: weights, optimizer, scaler and the buffers of norms stay what they were before it.

    It is decided between the backward and the optimizer's step, on all ranks alike, and waits for the device there. A
    learning-rate schedule goes on.

    Args:
        budget: how many of the last `within` steps may be skipped; one more is an error. Default: 10.
        within: see there. Default: 100.
    """

    budget: int = 10
    within: int = 100
    name = "skip"
    before_step = True

    def __post_init__(self) -> None:
        check_count("budget", self.budget)
        check_count("within", self.within)

    def start(self, training: Training) -> "Skipping":
        """Return the worker."""
        return Skipping(self, training)


class Skipping(Worker):
    """Skips the steps of one training."""

    action: Skip

    def __init__(self, action: Skip, training: Training) -> None:
        super().__init__(action, training)
        self._buffers = NormBuffers(training.model)
        self._scaler: dict[str, Any] | None = None
        self._skipped = deque[int]()

    def begin_step(self) -> None:
        """Copy the buffers of the norms."""
        self._buffers.keep()

    def act(self, why: Why) -> str:
        """Leave the gradients out, and restore what the forward has changed.

        Raises:
            OutOfBudget: too many steps were skipped.
        """
        training = self.training
        for optimizer in training.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._buffers.restore()
        if training.scaler is not None:
            self._scaler = training.scaler.state_dict()
        if not self._skipped or self._skipped[-1] != why.step:
            self._skipped.append(why.step)
        while self._skipped[0] <= why.step - self.action.within:
            self._skipped.popleft()
        if len(self._skipped) > self.action.budget:
            raise OutOfBudget(
                f"{len(self._skipped)} of the last {self.action.within} steps were to be skipped, and the budget is "
                f"{self.action.budget}. The last one: {why.reason}. So many batches are hardly at fault: look at that "
                "layer, go back to an earlier checkpoint, or lower the learning rate. The weights are those of the "
                "last good step"
            )
        return f"the step is left out ({len(self._skipped)} of {self.action.budget} in {self.action.within} steps)"

    def end_step(self, *, calm: bool) -> None:
        """Give the scaler its state back, which has counted the step meanwhile."""
        if self._scaler is not None:
            self.training.scaler.load_state_dict(self._scaler)
            self._scaler = None

    def state_dict(self) -> dict[str, Any]:
        """Return the steps that were skipped lately."""
        return {"skipped": list(self._skipped)}

    def load_state_dict(self, state: Any) -> None:
        """Continue to count."""
        self._skipped = deque(state["skipped"])
