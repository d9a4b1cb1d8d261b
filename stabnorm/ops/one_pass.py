"""A map over the rows and the column sums of what it reads, together: for a norm whose statistics lag behind.

PowerNorm past its warm-up divides by what earlier batches left, so that the output need not wait for this batch's
moments, nor the gradient for this batch's sums. Which phase it is in only the device knows. So the map is done on a
guess, and `redo_` does it again unless the guess was right. Where no kernel does both in one read, there is nothing to
gain, and the passes of `stabnorm.ops.rows` run one after the other.
"""

from torch import Tensor

from stabnorm.functional import BatchMoments
from stabnorm.ops.dispatch import execution
from stabnorm.ops.rows import affine_of_rows, gradient_of_rows, moments_of_rows, sums_of_rows


def saves_a_read(rows: Tensor, valid: Tensor | None) -> bool:
    """Whether a kernel does map and sums in one read of these rows."""
    return execution("one_pass", rows, valid) == "triton"


def affine_with_square(
    rows: Tensor, valid: Tensor | None, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, BatchMoments]:
    """`rows.affine_of_rows` and, of what it reads, `rows.moments_of_rows` without centering."""
    if saves_a_read(rows, valid):
        from stabnorm.ops import _triton_one_pass

        return _triton_one_pass.affine_with_square(rows, valid, scale, shift)
    return affine_of_rows(rows, scale, shift), moments_of_rows(rows, valid, center=False)


def redo_affine_(y: Tensor, right: Tensor, rows: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    """Write `rows.affine_of_rows` into ``y`` unless the bool scalar ``right`` is set."""
    if saves_a_read(rows, None):
        from stabnorm.ops import _triton_one_pass

        _triton_one_pass.redo_affine_(y, right, rows, scale, shift)
    else:
        y.copy_(affine_of_rows(rows, scale, shift))


def gradient_with_sums(
    dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`rows.gradient_of_rows` and `rows.sums_of_rows` of rows that are not centred."""
    if saves_a_read(rows, valid):
        from stabnorm.ops import _triton_one_pass

        return _triton_one_pass.gradient_with_sums(dy, rows, valid, scale, slope)
    dx = gradient_of_rows(dy, rows, None, valid, scale, slope, None)
    return dx, sums_of_rows(dy, rows, None, valid)


def redo_gradient_(
    dx: Tensor, right: Tensor, dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor
) -> None:
    """Write `rows.gradient_of_rows` into ``dx`` unless the bool scalar ``right`` is set."""
    if saves_a_read(rows, valid):
        from stabnorm.ops import _triton_one_pass

        _triton_one_pass.redo_gradient_(dx, right, dy, rows, valid, scale, slope)
    else:
        dx.copy_(gradient_of_rows(dy, rows, None, valid, scale, slope, None))
