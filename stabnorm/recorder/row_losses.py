"""`RowLosses`: what each row of a batch adds to the loss, read while the loss is computed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stabnorm.recorder.row_axis import Rows

_REDUCTIONS = ("mean", "sum", "nanmean", "nansum")
_AGREES = 0.01  # largest share of the loss that may be left unexplained


class RowLosses(TorchFunctionMode):
    """Notes, while it is open, every number to which losses of single elements are reduced.

    These are the losses of `torch.nn.functional`, such as `cross_entropy`, and means and sums of all elements of a
    tensor. `of_rows` then says which of them the loss is made of, by the gradient of the loss with respect to them, and
    adds up the elements of each row. A loss that is no weighted sum of such numbers tells nothing of its rows.

    >>> from stabnorm.recorder.row_axis import Rows
    >>> scores, targets = torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1, 2, -100])
    >>> with RowLosses() as losses:
    ...     loss = 2 * torch.nn.functional.cross_entropy(scores, targets)
    >>> [round(part, 2) for part in (losses.of_rows(loss, Rows(4)) / loss.item()).tolist()]
    [0.33, 0.33, 0.33, 0.0]
    """

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, and note a number that it made of many."""
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.ndim == 0 and result.requires_grad and result.is_floating_point():
            elements = _elements(func, args, kwargs)
            if elements is not None and elements.numel() > 1:
                self._parts.append((result, elements.detach()))
        return result

    def of_rows(self, loss: Tensor, rows: Rows) -> Tensor | None:
        """Return how much of the loss each row is, ``[rows]``, not finite where the row's is not; None if unknown.

        Args:
            loss: what was computed while this was open.
            rows: the rows of the batch.
        """
        if not self._parts or not loss.requires_grad:
            return None
        numbers = [number for number, _ in self._parts]
        weights = _gradients(loss.sum(), numbers)
        total = torch.zeros(rows.count, dtype=torch.float64 if loss.device.type != "mps" else torch.float32)
        for weight, (number, elements) in zip(weights, self._parts, strict=True):
            if weight is None or not weight or _any(_gradients(number, [n for n in numbers if n is not number])):
                continue  # it is no part of the loss, or is made of parts that are counted themselves
            of_row = rows.split(elements)
            if of_row is None:
                return None
            sums = of_row.to("cpu", total.dtype).sum(1)
            whole = sums.nansum()
            # A mean is a sum, divided by a number that a weight or an ignored index may change.
            reduced = float(number.detach())
            share = reduced / float(whole) if whole and math.isfinite(reduced) and sums.isfinite().all() else 1.0
            total += float(weight) * share * sums
        value = float(loss.detach().sum())
        explained = not total.isfinite().all() or abs(float(total.sum()) - value) <= _AGREES * abs(value)
        return total if explained and not (total < 0).any() else None


def _gradients(of: Tensor, numbers: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(of, numbers, retain_graph=True, allow_unused=True) if numbers else ()


def _any(gradients: Sequence[Tensor | None]) -> bool:
    return any(gradient is not None for gradient in gradients)


def _elements(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the numbers that a function of torch reduced to one; None if it is no such function."""
    if kwargs.get("reduction") in ("mean", "sum", "batchmean"):
        with torch.no_grad():
            elements = func(*args, **{**kwargs, "reduction": "none"})
        return elements if isinstance(elements, Tensor) else None
    if getattr(func, "__name__", "") in _REDUCTIONS:
        x = args[0] if args else kwargs.get("input", kwargs.get("self"))
        return x if isinstance(x, Tensor) else None
    return None
