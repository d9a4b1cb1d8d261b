"""The ops that let the components of `stabnorm.nn.UnMixTNS` follow a stream, once for each batch.

A forward normalises with the components as they are, and leaves the change that it asks for in `pending`; the next
forward carries it out first. So a recomputed forward finds the components of the first one. It changes nothing, and
neither does a forward that our own code runs, as `fold_norms` does.
"""

import torch
from torch import Tensor

from stabnorm._registration import returns_nothing
from stabnorm.ops.dispatch import op
from stabnorm.ops.moments import is_counted


@op(mutates=("components", "pending"), fake=lambda components, pending: torch.empty_like(components))
def settle_(components: Tensor, pending: Tensor) -> Tensor:
    """Carry out the change that the last forward has left, and return the components.

    Args:
        components: ``[2, K, C]``, means and variances.
        pending: the change, of the same shape; 0 afterwards.
    """
    if is_counted():
        components.add_(pending)
        pending.zero_()
    return components.clone()


@op(mutates=("pending",), fake=returns_nothing)
def leave_(pending: Tensor, change: Tensor) -> None:
    """Leave a change for the next forward.

    Args:
        pending: ``[2, K, C]``.
        change: of the same shape.
    """
    if is_counted():
        pending.copy_(change)
