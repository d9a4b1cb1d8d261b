"""`ReduceLR`: go on with a smaller learning rate."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stabnorm._checks import check_count, check_number
from stabnorm.actions.action import Action, Training, Why, Worker

_OF_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")  # those that schedulers of torch keep in a group


@torch.no_grad()
def scale_learning_rates(optimizers: Iterable[Optimizer], factor: float, schedulers: Iterable[Any] = ()) -> None:
    """Multiply all learning rates, those from which schedulers compute the next ones included.

    Args:
        optimizers: the optimizers.
        factor: what their learning rates are multiplied by.
        schedulers: the schedulers of these learning rates. Default: none.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    >>> scale_learning_rates([optimizer], 0.5, [scheduler])
    >>> optimizer.param_groups[0]["lr"], scheduler.base_lrs
    (0.05, [0.05])
    """
    check_number("factor", factor, above=0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name in _OF_GROUPS:
                if isinstance(group.get(name), Tensor):
                    group[name].mul_(factor)
                elif isinstance(group.get(name), int | float):
                    group[name] *= factor
    for scheduler in schedulers:
        for one in (scheduler, *getattr(scheduler, "_schedulers", ())):
            for name in ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "eta_min"):
                value = getattr(one, name, None)
                if isinstance(value, list):
                    setattr(one, name, [rate * factor for rate in value])
                elif isinstance(value, int | float):
                    setattr(one, name, value * factor)


@dataclass(frozen=True)
class ReduceLR(Action):
    """Multiplies all learning rates by a factor; their schedules go on from there.

    Args:
        factor: what they are multiplied by. Default: 0.5.
        times: how often this is done in a training, at most. Default: 3.
    """

    factor: float = 0.5
    times: int | None = 3
    name = "reduce_lr"

    def __post_init__(self) -> None:
        check_number("factor", self.factor, above=0, most=1)
        if self.times is not None:
            check_count("times", self.times)

    def start(self, training: Training) -> Worker:
        """Return the worker."""
        return _Reducing(self, training)


class _Reducing(Worker):
    action: ReduceLR

    def act(self, why: Why) -> str:
        scale_learning_rates(self.training.optimizers, self.action.factor, self.training.schedulers)
        return f"all learning rates are {self.action.factor:g} times what they were"
