"""The blend of two norms, and its gradient. Both are exact at lam = 0 and 1, even if the unused branch holds NaN."""

import torch
from torch import Tensor

from stabnorm import functional
from stabnorm.ops.dispatch import op


def _differentiated(lam: Tensor, *both: Tensor) -> bool:
    """Whether the call is recorded or batched; a kernel, or a view as integers, does not support that."""
    if not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_batchedtensor, both)):
        return True
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or (torch.is_grad_enabled() and any(t.requires_grad for t in both))


@op("norm", unless=_differentiated)
def blend(lam: Tensor, norm: Tensor, rep: Tensor) -> Tensor:
    """`functional.blend`, ``lam norm + (1 - lam) rep``.

    >>> blend(torch.tensor(1.0), torch.ones(2), torch.full((2,), torch.nan))
    tensor([1., 1.])
    """
    return functional.blend(lam, norm, rep)


@op("of_norm", unless=_differentiated)
def join_gradients(lam: Tensor, of_norm: Tensor, of_rep: Tensor) -> Tensor:
    """`functional.join_gradients`, their sum."""
    return functional.join_gradients(lam, of_norm, of_rep)
