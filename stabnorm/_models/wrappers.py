"""What `torch.compile`, activation checkpointing and data parallelism put around a user's modules."""

import torch
from torch import nn

_PARTS_OF_NAMES = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_PARALLEL = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def plain_name(name: str) -> str:
    """Give a module's name as the user knows it, without the parts that wrappers add.

    >>> plain_name("_orig_mod.blocks.0._checkpoint_wrapped_module.attn")
    'blocks.0.attn'
    """
    return ".".join(part for part in name.split(".") if part not in _PARTS_OF_NAMES)


def unwrapped(model: nn.Module) -> nn.Module:
    """Give the user's own model inside `torch.compile` and `DistributedDataParallel`, however often it is wrapped.

    >>> model = nn.Linear(2, 2)
    >>> unwrapped(torch.compile(model, backend="eager")) is model
    True
    """
    while True:
        if is_compiled(model):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` has made this module."""
    return type(module).__name__ == "OptimizedModule"


def is_scripted(module: nn.Module) -> bool:
    """Whether `torch.jit` has made this module."""
    return isinstance(module, torch.jit.ScriptModule)


def parallel_wrapper(module: nn.Module) -> str | None:
    """Name the class that trains this module on several processes; None where the module is not wrapped.

    >>> parallel_wrapper(nn.Linear(2, 2)) is None
    True
    """
    return min(_PARALLEL.intersection(cls.__name__ for cls in type(module).__mro__), default=None)
