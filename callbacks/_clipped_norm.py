"""The norm of the gradient before it was clipped, in a host that clips before it tells anybody."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabnorm.monitor.gradient_norm import norm_of_gradients


class ClippedNorm:
    """Notes what `torch.nn.utils.clip_grad_norm_` returns for the gradients of a model.

    That is their norm before they were clipped. Hugging Face's Trainer and Fabric clip with this function, and most
    plain loops do. It does what it does, and costs nothing more.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> clipped = ClippedNorm(model)
    >>> clipped.attach()
    >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
    >>> _ = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    >>> clipped.detach()
    >>> clipped.take()
    tensor(5.)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._norm: Tensor | None = None
        self._own: Any = None

    def attach(self) -> None:
        """Begin to note."""
        self.detach()
        own = torch.nn.utils.clip_grad_norm_

        def noting(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Tensor:
            listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            norm = own(listed, *args, **kwargs)
            model = self._model()
            ours = set() if model is None else set(map(id, model.parameters()))
            if any(id(parameter) in ours for parameter in listed):
                before = self._norm  # of another optimizer's parameters
                self._norm = norm.detach() if before is None else torch.hypot(before.to(norm), norm.detach())
            return norm

        self._own, self._noting = own, noting
        torch.nn.utils.clip_grad_norm_ = noting  # type: ignore[assignment]

    def detach(self) -> None:
        """Give torch its own function back."""
        if self._own is not None and torch.nn.utils.clip_grad_norm_ is self._noting:
            torch.nn.utils.clip_grad_norm_ = self._own
        self._own = None

    def take(self, *optimizers: Optimizer) -> Tensor | None:
        """Return the norm of the step that ends, and forget it.

        Args:
            *optimizers: whose gradients are measured if nobody has clipped them. Default: none.
        """
        norm, self._norm = self._norm, None
        if norm is None:
            norm = norm_of_gradients(optimizers)
        return norm.full_tensor() if norm is not None and hasattr(norm, "full_tensor") else norm
