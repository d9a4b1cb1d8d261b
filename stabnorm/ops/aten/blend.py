"""The ATen backend of `blend`.

On a CPU, `torch.where` with a scalar condition costs three times as much as a product (1.8 ms and 0.5 ms at
8192 x 384). So the bits of an unused branch are set to 0 with an integer `and`, which makes +0 of a NaN, too. This
branch has the weight -0.0, because adding -0.0 changes no bit of the other branch.
"""

import torch
from torch import Tensor

from stabnorm.ops.blend import blend, join_gradients

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@blend.backend("aten")
def blend_by_bits(lam: Tensor, norm: Tensor, rep: Tensor) -> Tensor:
    """See `functional.blend`."""
    of_norm = torch.where(lam == 0, -0.0, lam)
    of_rep = torch.where(lam == 1, -0.0, 1 - lam)
    return _weighted_sum(lam, norm, rep, of_norm, of_rep.to(norm.dtype))


@join_gradients.backend("aten")
def join_by_bits(lam: Tensor, of_norm: Tensor, of_rep: Tensor) -> Tensor:
    """See `functional.join_gradients`."""
    both = torch.ones_like(lam)
    weights = (torch.where(lam == end, -0.0, both).to(of_norm.dtype) for end in (0, 1))
    return _weighted_sum(lam, of_norm, of_rep, *weights)


def _weighted_sum(lam: Tensor, norm: Tensor, rep: Tensor, of_norm: Tensor, of_rep: Tensor) -> Tensor:
    return (_unless(lam == 0, norm) * of_norm).addcmul_(_unless(lam == 1, rep), of_rep)


def _unless(silent: Tensor, t: Tensor) -> Tensor:
    """Return ``t``, or +0 everywhere if the scalar ``silent`` is true."""
    integer = _INTEGERS[t.element_size()]
    keep = silent.to(integer) - 1  # all ones or all zeros
    return t.view(integer).bitwise_and(keep).view(t.dtype)
