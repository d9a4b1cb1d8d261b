"""Where a model's tensors are, and in what precision."""

import itertools

import torch
from torch import Tensor, nn


def device_of(*modules: nn.Module) -> torch.device:
    """Give the device of the first tensor in these modules, parameters first; torch's default where there is none.

    >>> device_of(nn.Identity(), nn.Linear(2, 2, device="meta"))
    device(type='meta')
    """
    tensors = itertools.chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
    return next(tensors, torch.empty(0)).device


def floating_tensor_of(*modules: nn.Module) -> Tensor:
    """Give the first floating tensor in these modules: new tensors belong on its device, and in its precision.

    Where there is none, an empty tensor of torch's defaults.

    >>> floating_tensor_of(nn.BatchNorm1d(3, affine=False, dtype=torch.float64)).dtype
    torch.float64
    """
    tensors = itertools.chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
