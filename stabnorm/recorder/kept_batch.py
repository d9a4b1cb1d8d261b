"""What a flight recorder keeps of a batch: its size, copies of shared tensors, and all of it on the host."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stabnorm.recorder.row_axis import tensors_of


def unshared(value: Any) -> Any:
    """Return a batch with copies of what it shares with another process, which would run out of open files."""
    shared = any(x.device.type == "cpu" and x.is_shared() for x in tensors_of(value))
    return _mapped(value, torch.clone) if shared else value


def size_of(value: Any) -> int:
    """Return the bytes of the tensors in a batch."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(value))


def on_host(value: Any) -> Any:
    """Return a batch with its tensors on the host."""
    return _mapped(value, lambda x: x.detach().to("cpu", copy=True))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with each tensor changed, in plain containers."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return tuple(_mapped(part, change) for part in value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(part, change) for part in value)
    return value
