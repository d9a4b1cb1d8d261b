"""The norm of an optimizer's gradients, as it is before clipping, without waiting for the device."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def gradient_norm(optimizer: Optimizer, scale: Tensor | float | None = None) -> Tensor | None:
    """Return |g|_2 over all parameters of an optimizer, a tensor on their device; None if there is no gradient.

    Args:
        optimizer: the optimizer that is about to step.
        scale: the loss scale. Gradients still have it only where the optimizer itself removes it, as fused ones do.
            Default: none.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> gradient_norm(torch.optim.SGD([weight], lr=0.1))
    tensor(5.)
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [g for p in parameters if isinstance(p, Tensor) and (g := p.grad) is not None]
    gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients if g.numel()]
    if not gradients:
        return None
    norm: Any
    with torch.no_grad():
        kinds = {(type(g), g.device, g.dtype) for g in gradients}
        if len(kinds) == 1 and type(gradients[0]) is Tensor:  # as `get_total_norm` does it for each kind
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # of shards
        norm = norm.full_tensor()
    still_scaled = scale is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    result: Tensor = norm / scale if still_scaled else norm
    return result


def norm_of_gradients(optimizers: Iterable[Optimizer]) -> Tensor | None:
    """Return |g|_2 over all parameters of several optimizers, see `gradient_norm`."""
    norms = [norm for norm in map(gradient_norm, optimizers) if norm is not None]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms])) if norms else None
