"""A map over the rows and the column sums of what it reads, together: for a norm whose statistics lag behind.

PowerNorm past its warm-up divides by what earlier batches left, so that the output need not wait for this batch's
moments, nor the gradient for this batch's sums. Which phase it is in only the device knows. So the map is done on a
guess, and `redo_` does it again unless the guess was right. Where no body does both in one read, there is nothing to
gain, and the passes of `stabnorm.ops.rows` run one after the other.
"""

import torch
from torch import Tensor

from stabnorm.functional import BatchMoments
from stabnorm.ops.dispatch import execution
from stabnorm.ops.rows import affine_of_rows, gradient_of_rows, moments_of_rows, sums_of_rows


def saves_a_read(rows: Tensor, valid: Tensor | None) -> bool:
    """Whether a body does map and sums in one read of these rows."""
    return execution("one_pass", rows, valid) in ("triton", "cpp")


def worth_a_guess(rows: Tensor, step: Tensor, warmup: int) -> bool:
    """Whether the guess may be right: in a warm-up it is not, but only the host's memory can be looked up."""
    return rows.device.type != "cpu" or int(step) >= warmup


def affine_with_square(
    rows: Tensor, valid: Tensor | None, scale: Tensor, shift: Tensor | None, guess: bool = True
) -> tuple[Tensor, BatchMoments]:
    """`rows.affine_of_rows` and, of what it reads, `rows.moments_of_rows` without centering.

    Without a `guess` the map is left to `redo_affine_`.
    """
    if not guess:
        return torch.empty_like(rows), moments_of_rows(rows, valid, center=False)
    body = execution("one_pass", rows, valid)
    if body == "triton":
        from stabnorm.ops.triton import one_pass as _triton_one_pass

        return _triton_one_pass.affine_with_square(rows, valid, scale, shift)
    if body == "cpp":
        from stabnorm.ops.cpp import one_pass as _cpp_one_pass

        return _cpp_one_pass.affine_with_square(rows, valid, scale, shift)
    return affine_of_rows(rows, scale, shift), moments_of_rows(rows, valid, center=False)


def redo_affine_(y: Tensor, right: Tensor, rows: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    """Write `rows.affine_of_rows` into ``y`` unless the bool scalar ``right`` is set."""
    body = execution("one_pass", rows, None)
    if body == "triton":
        from stabnorm.ops.triton import one_pass as _triton_one_pass

        _triton_one_pass.redo_affine_(y, right, rows, scale, shift)
    elif body != "cpp" or not right:  # in the host's own memory: nothing is waited for
        y.copy_(affine_of_rows(rows, scale, shift))


def gradient_with_sums(
    dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor, guess: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`rows.gradient_of_rows` and `rows.sums_of_rows` of rows that are not centred; `guess` as above."""
    if not guess:
        return torch.empty_like(rows), sums_of_rows(dy, rows, None, valid)
    body = execution("one_pass", rows, valid)
    if body == "triton":
        from stabnorm.ops.triton import one_pass as _triton_one_pass

        return _triton_one_pass.gradient_with_sums(dy, rows, valid, scale, slope)
    if body == "cpp":
        from stabnorm.ops.cpp import one_pass as _cpp_one_pass

        return _cpp_one_pass.gradient_with_sums(dy, rows, valid, scale, slope)
    dx = gradient_of_rows(dy, rows, None, valid, scale, slope, None)
    return dx, sums_of_rows(dy, rows, None, valid)


def redo_gradient_(
    dx: Tensor, right: Tensor, dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor
) -> None:
    """Write `rows.gradient_of_rows` into ``dx`` unless the bool scalar ``right`` is set."""
    body = execution("one_pass", rows, valid)
    if body == "triton":
        from stabnorm.ops.triton import one_pass as _triton_one_pass

        _triton_one_pass.redo_gradient_(dx, right, dy, rows, valid, scale, slope)
    elif body != "cpp" or not right:
        dx.copy_(gradient_of_rows(dy, rows, None, valid, scale, slope, None))
