"""Copies of a model that carry nothing of ours."""

import copy
from typing import Any

from torch import Tensor, nn

from stabnorm._models.hooks import drop_inert_hooks


def copied(model: nn.Module) -> nn.Module:
    """Copy a model deeply, without the hooks and the watched classes of a monitor that is attached to it.

    A tensor that a forward with gradients left on a module, such as a pruned weight, is copied without its history.

    Raises:
        ValueError: the model cannot be copied.

    >>> model = nn.Linear(2, 3)
    >>> copied(model).weight is model.weight
    False
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"the model cannot be copied, which verifying needs: {error}") from error
    for module in made.modules():
        drop_inert_hooks(module)
    return made
