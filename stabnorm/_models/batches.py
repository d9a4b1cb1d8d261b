"""The one format of a batch: what a loader gives, and how a model is called with it.

A *batch* comes from a loader, which mostly gives more than the inputs:

- a tensor is the input: ``model(batch)``;
- a tuple or a list is ``(inputs, targets, ...)``: ``model(batch[0])``;
- a mapping holds keyword arguments: ``model(**batch)``.

It is moved to the model's device first. Where a model takes something else, pass ``forward(model, batch)``.

`recalibrate_norms`, `remove_norms`, ``convert_norms(loader=)`` and `guard_folds` read batches. `fold_norms`,
`fold_gains`, `to_pre_rms` and `plan_fold` read *examples*, which hold a model's arguments and nothing else, see
`stabnorm._models.examples`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from stabnorm._checks import wrong_item
from stabnorm.errors import StabNormError

Forward = Callable[[nn.Module, Any], Any]  # how a model is run on a batch


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give the arguments that a batch stands for, positional and by keyword.

    >>> arguments_of(("inputs", "targets")), arguments_of({"input_ids": "ids"})
    ((('inputs',), {}), ((), {'input_ids': 'ids'}))
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch[0] if isinstance(batch, tuple | list) else batch,), {}


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Run the model on a batch; the format is described in the module's docstring.

    Raises:
        TypeError: the batch is a number, or None.
    """
    if batch is None or isinstance(batch, int | float):
        raise wrong_item("loader", batch, "tensors, tuples (inputs, targets), or dicts of arguments")
    args, kwargs = arguments_of(batch)
    return model(*args, **kwargs)


def moved(batch: Any, device: torch.device) -> Any:
    """Give the batch on a device, whatever containers hold its tensors."""
    if hasattr(batch, "to"):  # a tensor, or what Hugging Face's tokenizers and graph libraries call a batch
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [moved(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)  # a namedtuple keeps its names
    return batch


def batches_of(loader: Iterable[Any], limit: int | None = None) -> Iterator[Any]:
    """Go through a loader that several passes are made over, from its beginning.

    Args:
        loader: a DataLoader or a list of batches.
        limit: how many batches to take. Default: all.

    Raises:
        ValueError: the loader is an iterator, which gives its batches only once.
        StabNormError: the loader is empty.
    """
    if iter(loader) is loader:
        raise ValueError(
            f"the loader is a {type(loader).__name__}, which gives its batches only once, and several passes are "
            "needed. Pass a DataLoader or a list of batches"
        )
    count = 0
    for batch in itertools.islice(loader, limit):
        count += 1
        yield batch
    if not count:
        raise StabNormError("the loader is empty, so there is nothing to fit to. Give one with batches")
