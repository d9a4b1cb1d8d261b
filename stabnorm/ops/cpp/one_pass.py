"""The C++ backend of `one_pass`, see `one_pass.cpp`. The flag is a CPU tensor, so reading it does not sync."""

import torch
from torch import Tensor

from stabnorm.functional import BatchMoments
from stabnorm.ops.cpp.library import call, like, maybe_vector, maybe_whole, shape_of, vector
from stabnorm.ops.one_pass import affine_with_square, gradient_with_sums, redo_affine_, redo_gradient_


@affine_with_square.backend("cpp")
def affine(
    rows: Tensor, valid: Tensor | None, scale: Tensor, shift: Tensor | None, guess: bool = True
) -> tuple[Tensor, BatchMoments]:
    """See `ops.one_pass.affine_with_square`."""
    rows = rows.contiguous()
    y, square = torch.empty_like(rows), rows.new_empty(rows.shape[1], dtype=torch.float32)
    # Without a guess, too, the sums are added in this order: a recompute must have the bits of the first forward.
    count = call(
        "affine_square", rows, *shape_of(rows), maybe_whole(valid), vector(scale), maybe_vector(shift),
        torch.get_num_threads(), y if guess else None, square,
    )  # fmt: skip
    return y, BatchMoments(square.new_full((), count), None, square.div_(max(count, 1)))


@gradient_with_sums.backend("cpp")
def gradient(
    dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor, guess: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See `ops.one_pass.gradient_with_sums`."""
    if not guess:
        return gradient_with_sums.formula(dy, rows, valid, scale, slope, False)
    rows = rows.contiguous()
    dx, sums = torch.empty_like(rows), rows.new_empty(4, rows.shape[1], dtype=torch.float32)
    call(
        "gradient_sums", like(rows, dy), rows, *shape_of(rows), maybe_whole(valid), vector(scale), vector(slope),
        torch.get_num_threads(), dx, sums,
    )  # fmt: skip
    return dx, sums.unbind()


@redo_affine_.backend("cpp")
def redo_map_(y: Tensor, right: Tensor, rows: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    """See `ops.one_pass.redo_affine_`."""
    if not right:
        redo_affine_.formula(y, right, rows, scale, shift)


@redo_gradient_.backend("cpp")
def redo_input_gradient_(
    dx: Tensor, right: Tensor, dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor
) -> None:
    """See `ops.one_pass.redo_gradient_`."""
    if not right:
        redo_gradient_.formula(dx, right, dy, rows, valid, scale, slope)
