"""What an optimizer and its gradient scaler tell, in every host."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def scale_of(scaler: Any) -> Tensor | float | None:
    """Return a scaler's factor; None without a scaler.

    It is the scaler's own tensor if it has one, because `get_scale()` would wait for the device.
    """
    if scaler is None:
        return None
    scale = getattr(scaler, "_scale", None)
    return scale if isinstance(scale, Tensor) else float(scaler.get_scale())


def learning_rate(optimizer: Any) -> Tensor | float | None:
    """Return the learning rate of the first parameter group; None if the optimizer has none.

    A tensor is copied on its device, because a scheduler changes it in place.
    """
    value = next((group.get("lr") for group in optimizer.param_groups), None)
    if isinstance(value, Tensor):
        return value.detach().clone() if value.numel() == 1 else None
    return value if isinstance(value, int | float) else None


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside of what Fabric or accelerate has put around it."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
