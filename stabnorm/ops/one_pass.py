"""A map over the rows and the column sums of what it reads, together: for a norm whose statistics lag behind.

PowerNorm past its warm-up divides by what earlier batches left, so that the output need not wait for this batch's
moments, nor the gradient for this batch's sums. Only the device knows which phase it is in. So the map is done on a
guess, and `redo_` does it again unless the guess was right. The formulas are the passes of `stabnorm.ops.rows`, one
after the other: without a backend that does both in one read there is nothing to gain.
"""

import torch
from torch import Tensor

from stabnorm.functional import BatchMoments
from stabnorm.ops.dispatch import REFERENCE, op
from stabnorm.ops.rows import affine_of_rows, gradient_of_rows, moments_of_rows, sums_of_rows


@op("rows")
def affine_with_square(
    rows: Tensor, valid: Tensor | None, scale: Tensor, shift: Tensor | None, guess: bool = True
) -> tuple[Tensor, BatchMoments]:
    """`rows.affine_of_rows` and, of what it reads, `rows.moments_of_rows` without centering.

    Without a `guess` the map is left to `redo_affine_`.
    """
    y = affine_of_rows(rows, scale, shift) if guess else torch.empty_like(rows)
    return y, moments_of_rows(rows, valid, center=False)


@op("rows")
def redo_affine_(y: Tensor, right: Tensor, rows: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    """Write `rows.affine_of_rows` into ``y`` unless the bool scalar ``right`` is set."""
    y.copy_(affine_of_rows(rows, scale, shift))


@op("rows")
def gradient_with_sums(
    dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor, guess: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`rows.gradient_of_rows` and `rows.sums_of_rows` of rows that are not centred; `guess` as above."""
    dx = gradient_of_rows(dy, rows, None, valid, scale, slope, None) if guess else torch.empty_like(rows)
    return dx, sums_of_rows(dy, rows, None, valid)


@op("rows")
def redo_gradient_(
    dx: Tensor, right: Tensor, dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor
) -> None:
    """Write `rows.gradient_of_rows` into ``dx`` unless the bool scalar ``right`` is set."""
    dx.copy_(gradient_of_rows(dy, rows, None, valid, scale, slope, None))


def saves_a_read(rows: Tensor, valid: Tensor | None) -> bool:
    """Whether a backend does map and sums in one read of these rows."""
    return affine_with_square.chosen(rows, valid) != REFERENCE


def worth_a_guess(rows: Tensor, step: Tensor, warmup: int) -> bool:
    """Whether the guess may be right: in a warm-up it is not, but only on the host can the step be read for free."""
    return rows.device.type != "cpu" or int(step) >= warmup
