"""The numbers of a step that are not a layer's: loss, learning rate, and what else `StabilityMonitor.step` is told."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabnorm._checks import check_scalar
from stabnorm.monitor.details import optimizers_of
from stabnorm.monitor.loss_scales import Scale

# The last one says whether the loss that was given is NaN or infinite; NaN if none was given.
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


def scalars_of(given: Mapping[str, Tensor | float | None], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the numbers that the host knows, and those that are on a device: ``[len(SCALARS)]`` each, NaN elsewhere.

    No tensor on another device than a CPU is read, and nothing is copied to the device: tensors take one launch there,
    whatever their number. `joined` puts the two parts together.

    >>> given = {"loss": torch.tensor(0.5), "learning_rate": 1.0, "gradient_norm": None}
    >>> [part[:3] for part in scalars_of(given, torch.device("cpu"))]
    [tensor([0.5000, 1.0000,    nan]), tensor([nan, nan, nan])]
    """
    tensors: dict[str, Tensor] = {}
    numbers = [math.nan] * len(SCALARS)
    for column, name in enumerate(SCALARS):
        value = given.get(name)
        if type(value) is Tensor and value.is_cpu and value.ndim == 0 and device.type == "cpu":
            number: Any = value.tolist()  # it is on the host; this takes no torch operation
            numbers[column] = float(number)
        elif isinstance(value, Tensor):
            tensors[name] = value.detach().reshape(())
        else:
            numbers[column] = _or_nan(value)
    missing, nothing = _missing(device)
    if tensors:
        there = [tensors[name].to(device, non_blocking=True) if name in tensors else missing for name in SCALARS]
        nothing = torch.stack(there).to(torch.float32)
    return torch.from_numpy(np.array(numbers, np.float32)), nothing


def on_device(value: Tensor | float | None, device: torch.device) -> Tensor:
    """Return a number as ``[1]`` in float32 on a device, NaN where nothing is given; no tensor is read."""
    if isinstance(value, Tensor):
        return value.detach().reshape(1).to(device, torch.float32, non_blocking=True)
    return torch.full((1,), _or_nan(value), dtype=torch.float32, device=device)


def _or_nan(value: Tensor | float | None) -> float:
    return math.nan if value is None else float(value)


@functools.cache
def _missing(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return NaN on a device, as a scalar and for all names; nobody changes them."""
    with torch.inference_mode(False):
        nothing = torch.full((len(SCALARS),), torch.nan, dtype=torch.float32, device=device)
    return nothing[0], nothing


def joined(*parts: Tensor) -> Tensor:
    """Return the scalars of steps, ``[steps, len(SCALARS)]`` on the host, from parts of which one at most has each.

    NaN also stands for a loss that was not given; so it is noted here whether one that was given is NaN or infinite.

    >>> host, device = torch.tensor([[torch.nan] * 6 + [0.0]]), torch.tensor([[torch.inf] + [torch.nan] * 6])
    >>> joined(host, device)[0, [SCALARS.index("loss"), SCALARS.index("nonfinite")]]
    tensor([inf, 1.])
    """
    scalars = functools.reduce(lambda some, others: torch.where(some.isnan(), others, some), parts)
    loss, odd = (scalars[:, SCALARS.index(name)] for name in ("loss", "nonfinite"))
    odd.copy_(torch.where(odd.isnan(), odd, (~torch.isfinite(loss)).to(odd.dtype)))
    return scalars


def with_all_scalars(scalars: Tensor) -> Tensor:
    """Return ``[steps, SCALARS]``, NaN where a checkpoint of an earlier version has fewer of them."""
    return nn.functional.pad(scalars, (0, len(SCALARS) - scalars.shape[1]), value=torch.nan)
