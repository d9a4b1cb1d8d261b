"""Hooks and compiled models: a graph has the hooks that were on when it was traced."""

import torch
from torch import nn


def forget_graphs(model: nn.Module) -> None:
    """Have what is compiled traced anew: graphs from before, of a learning-rate search say, have no hooks in them."""
    if any(_is_compiled(module) for module in model.modules()):
        torch.compiler.reset()


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
