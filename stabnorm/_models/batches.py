"""A loader's batches: how a model is called with one, and how one gets onto a device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def run_batch(model: nn.Module, batch: Any) -> Any:
    """``model(batch)`` for a tensor, ``model(batch[0])`` for a tuple or list, ``model(**batch)`` for a mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch on a device, whatever containers hold its tensors."""
    if hasattr(batch, "to"):  # a tensor, or what Hugging Face's tokenizers and graph libraries call a batch
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [moved(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)  # a namedtuple keeps its names
    return batch
