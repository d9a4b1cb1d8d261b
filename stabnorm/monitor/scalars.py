"""The numbers of a step that are not a layer's: loss, learning rate, and what else `StabilityMonitor.step` is told."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabnorm._checks import check_scalar
from stabnorm.monitor.details import optimizers_of
from stabnorm.monitor.loss_scales import Scale

# The last one says whether a number that was given is NaN or infinite.
SCALARS = ("loss", "learning_rate", "gradient_norm", "weight_decay", "loss_scale", "measured_every", "nonfinite")


def check_scalars(
    given: Mapping[str, Tensor | float | None], grad_scale: Scale | Mapping[Optimizer, Scale] | None
) -> None:
    """Check what `StabilityMonitor.step` is given; no tensor is read.

    Raises:
        ValueError: something is not a single number, or the scale is not above 0.
        TypeError: something is no number.
    """
    for name, value in given.items():
        if value is not None:
            check_scalar(name, value)
    if grad_scale is not None:
        if isinstance(grad_scale, Mapping) and not optimizers_of(list(grad_scale)):
            raise ValueError("grad_scale={} names no optimizer. Give one number, or a number for each optimizer")
        for scale in grad_scale.values() if isinstance(grad_scale, Mapping) else [grad_scale]:
            check_scalar("grad_scale", scale, above=0)


def last_scale(grad_scale: Scale | Mapping[Optimizer, Scale] | None) -> Scale | None:
    """Return the loss scale of the optimizer that stepped last."""
    return [*grad_scale.values()][-1] if isinstance(grad_scale, Mapping) else grad_scale


def scalars_of(given: Mapping[str, Tensor | float | None], device: torch.device) -> Tensor:
    """Return ``[len(SCALARS)]`` on a device, NaN where nothing is given; no tensor is read.

    >>> scalars_of({"loss": 0.5, "learning_rate": None}, torch.device("cpu"))[:2]
    tensor([0.5000,    nan])
    """
    scalars = torch.full((len(SCALARS),), torch.nan, dtype=torch.float32, device=device)
    for name, scalar in given.items():
        if scalar is not None:
            number = scalar.detach().reshape(()) if isinstance(scalar, Tensor) else float(scalar)
            scalars[SCALARS.index(name)] = number
    return scalars


def mark_nonfinite_loss(scalars: Tensor) -> None:
    """Note whether the loss that was given is NaN or infinite, because NaN also stands for one that was not."""
    scalars[SCALARS.index("nonfinite")] = ~torch.isfinite(scalars[SCALARS.index("loss")])


def with_all_scalars(scalars: Tensor) -> Tensor:
    """Return ``[steps, SCALARS]``, NaN where a checkpoint of an earlier version has fewer of them."""
    return nn.functional.pad(scalars, (0, len(SCALARS) - scalars.shape[1]), value=torch.nan)
