"""The power iteration of a reparametrized weight: one step per forward, none in a recomputed one.

As in `stabnorm.ops.moments`, the op is opaque to the compiler, so that a recompute is recognised at run time.
"""

from torch import Tensor

from stabnorm._registration import returns_nothing
from stabnorm.functional.spectral import power_step
from stabnorm.ops.dispatch import op
from stabnorm.ops.moments import is_recompute


@op(mutates=("left", "right"), fake=returns_nothing)
def power_step_(matrices: Tensor, left: Tensor, right: Tensor) -> None:
    """`functional.power_step` in place; a recomputed forward changes nothing.

    Args:
        matrices: ``[P, outputs, inputs]``.
        left: ``[P, outputs]``.
        right: ``[P, inputs]``.
    """
    if is_recompute():
        return
    new = power_step(matrices.detach(), left)
    left.copy_(new[0])
    right.copy_(new[1])
