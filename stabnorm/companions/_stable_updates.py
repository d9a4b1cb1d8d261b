"""Which optimizers have a bound of stability, and how they divide the gradient."""

import inspect

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from stabnorm.companions._optimizer_steps import Group, learning_rate_of
from stabnorm.functional import adam_preconditioner, stability_bound


def has_bound(optimizer: torch.optim.Optimizer, group: Group) -> bool:
    """Whether the optimizer is Adam, AdamW or SGD, or a subclass that steps as one of them does."""
    return _steps_as(optimizer, Adam, AdamW, SGD) and not group.get("maximize", False)


def metric(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, group: Group) -> Tensor | float:
    """Return M = b P of a parameter, right after the optimizer's step.

    P is what the optimizer divides the gradient by, and b the bound on the eigenvalues of P^-1 H.
    """
    learning_rate = learning_rate_of(group)
    if _steps_as(optimizer, SGD):
        momentum = group["momentum"]
        gain = 1 - group["dampening"] if momentum else 1.0
        return stability_bound(learning_rate, momentum, gain, nesterov=group["nesterov"])
    state, (beta1, beta2) = optimizer.state[parameter], group["betas"]
    second_moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    bound = stability_bound(learning_rate, beta1, 1 - beta1)
    return bound * adam_preconditioner(second_moment, state["step"], beta2, group["eps"])


def decay_in_gradient(optimizer: torch.optim.Optimizer, group: Group) -> float:
    """Return the weight decay that the optimizer adds to the gradient; AdamW's is not in the gradient."""
    decoupled = group.get("decoupled_weight_decay", _steps_as(optimizer, AdamW))  # torch 2.6 has no such entry
    return 0.0 if decoupled else group.get("weight_decay", 0.0)


def _steps_as(optimizer: torch.optim.Optimizer, *kinds: type[torch.optim.Optimizer]) -> bool:
    step = inspect.unwrap(type(optimizer).step)
    return any(step is inspect.unwrap(kind.step) for kind in kinds)
