"""Which optimizers have a bound of stability, and what their step is."""

import inspect

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from stabnorm.companions._optimizer_steps import Group, option_of
from stabnorm.functional import adam_preconditioner, stability_bound


def has_bound(optimizer: torch.optim.Optimizer, group: Group) -> bool:
    """Whether the optimizer is Adam, AdamW or SGD, or a subclass that steps as one of them does."""
    if _steps_as(optimizer, SGD) and group["momentum"] >= 1:  # its steps never settle
        return False
    return _steps_as(optimizer, Adam, AdamW, SGD) and not group.get("maximize", False)


def steady_step(
    gradient: Tensor, parameter: nn.Parameter, optimizer: torch.optim.Optimizer, group: Group
) -> tuple[Tensor, Tensor | float]:
    r"""Return the step s that an optimizer would take if all gradients were this one, and r with :math:`M s = r g`.

    .. math:: s = \frac{\gamma \eta}{1 - \beta} P^{-1} g, \qquad M = b P, \qquad r = \frac{b \gamma \eta}{1 - \beta}

    It is asked right after the optimizer's own step. P is what the optimizer divides the gradient by, b the bound on
    the eigenvalues of :math:`P^{-1} H`; the other letters are those of `stability_bound`. The learning rate cancels out
    in r, so that it may be 0.
    """
    rate = option_of(group, "lr")
    if _steps_as(optimizer, SGD):
        momentum, nesterov = group["momentum"], group["nesterov"]
        gain = 1 - group["dampening"] if momentum else 1.0
        length = gain / (1 - momentum)
        return length * rate * gradient, length * stability_bound(1.0, momentum, gain, nesterov=nesterov)
    state, (beta1, beta2) = optimizer.state[parameter], group["betas"]
    second_moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    divisor = adam_preconditioner(second_moment, state["step"], beta2, group["eps"])
    return rate * gradient / divisor, stability_bound(1.0, beta1, 1 - beta1)


def decay_in_gradient(optimizer: torch.optim.Optimizer, group: Group) -> float:
    """Return the weight decay that the optimizer adds to the gradient; AdamW's is not in the gradient."""
    decoupled = group.get("decoupled_weight_decay", _steps_as(optimizer, AdamW))  # torch 2.6 has no such entry
    return 0.0 if decoupled else group.get("weight_decay", 0.0)


def _steps_as(optimizer: torch.optim.Optimizer, *kinds: type[torch.optim.Optimizer]) -> bool:
    step = inspect.unwrap(type(optimizer).step)
    return any(step is inspect.unwrap(kind.step) for kind in kinds)
