"""`Rows`: where the rows of a batch, its samples, lie in the tensors of the batch and of the model."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """The rows of a batch.

    Args:
        count: how many there are.
        second: whether they are the second axis where the first one could be meant as well, as in ``[length, batch]``.
            Default: False.

    >>> Rows(2).axis((2, 7)), Rows(2).axis((7, 2)), Rows(2, second=True).axis((2, 2)), Rows(2).axis((7,))
    (0, 1, 1, None)
    """

    count: int
    second: bool = False

    @classmethod
    def of(cls, batch: Any, model: nn.Module, samples: Sequence[int] | None = None) -> "Rows | None":
        """Find the rows of a batch; None if nothing in it has any.

        Args:
            batch: the batch.
            model: the model. If a module of it says ``batch_first=False``, rows may be the second axis.
            samples: one entry for each row, as the sampler tells them; a collate function may have packed or left out
                some, and then they tell nothing. Default: not known.
        """
        told = [module.batch_first for module in model.modules() if isinstance(getattr(module, "batch_first", 0), bool)]
        second = bool(told) and not any(told)
        shapes = [tuple(tensor.shape) for tensor in tensors_of(batch) if tensor.ndim]
        if samples is not None and any(len(samples) in shape[:2] for shape in shapes):
            return cls(len(samples), second)
        flat = [shape[0] for shape in shapes if len(shape) == 1]  # labels, for example: one for each row
        sizes = flat or [shape[1 if second else 0] for shape in shapes]
        return cls(Counter(sizes).most_common(1)[0][0], second) if sizes else None

    def axis(self, shape: Sequence[int]) -> int | None:
        """Return the axis of a shape that has the rows; None if none has."""
        axes = [axis for axis, size in enumerate(shape) if size == self.count]
        if not axes:
            return None
        return axes[1] if self.second and axes[:2] == [0, 1] else axes[0]

    def split(self, x: Tensor) -> Tensor | None:
        """Return a tensor as ``[rows, the rest]``; None where rows cannot be told.

        Rows and tokens in one axis are taken apart where their product can be, as they were before `flatten`.

        >>> Rows(2).split(torch.arange(6)), Rows(2, second=True).split(torch.arange(6))
        (tensor([[0, 1, 2],
                [3, 4, 5]]), tensor([[0, 2, 4],
                [1, 3, 5]]))
        """
        split = self.apart(x)
        return None if split is None else split.reshape(self.count, -1)

    def apart(self, x: Tensor) -> Tensor | None:
        """Return a tensor with the rows as its first axis; None where rows cannot be told."""
        if not x.ndim or not self.count:
            return None
        axis = self.axis(x.shape)
        if axis is not None:
            return x.movedim(axis, 0)
        if x.shape[0] % self.count:
            return None
        each = x.shape[0] // self.count
        if self.second:
            return x.reshape(each, self.count, *x.shape[1:]).movedim(1, 0)
        return x.reshape(self.count, each, *x.shape[1:])

    def replaced(self, batch: Any, rows: Sequence[int], by: int) -> Any:
        """Return a batch in which another row stands in the place of some.

        Args:
            batch: the batch, which is left as it is.
            rows: the rows that are left out.
            by: the row that takes their places.

        >>> Rows(3).replaced({"x": torch.arange(3), "names": ["a", "b", "c"]}, [0, 2], 1)
        {'x': tensor([1, 1, 1]), 'names': ['b', 'b', 'b']}
        """
        if isinstance(batch, Tensor):
            axis = self.axis(batch.shape)
            if axis is None:
                return batch
            order = torch.arange(self.count, device=batch.device)
            order[list(rows)] = by
            return batch.index_select(axis, order)
        if isinstance(batch, MutableMapping):
            made = copy.copy(batch)  # of the same class, which may have methods that the model's owner calls
            for key, value in batch.items():
                made[key] = self.replaced(value, rows, by)
            return made
        if isinstance(batch, tuple | list):
            has_rows = any(isinstance(part, Tensor) and self.axis(part.shape) is not None for part in batch)
            if len(batch) == self.count and not has_rows:  # one part for each row, such as images of different sizes
                parts = [batch[by] if row in rows else part for row, part in enumerate(batch)]
            else:
                parts = [self.replaced(part, rows, by) for part in batch]
            return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
        return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Go through the tensors of a batch, whatever containers hold them."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors_of(value)
