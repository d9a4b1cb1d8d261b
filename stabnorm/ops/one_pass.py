"""A map over the rows together with column sums of its input, for a norm that uses statistics of earlier batches.

After its warm-up, PowerNorm divides by a statistic of earlier batches. So the output does not depend on the moments of
this batch, nor the gradient on its sums, and one read is enough for both. Only the device knows whether the warm-up is
over. Therefore the map is computed with a guess, and `redo_` computes it again if the guess was wrong. The formulas are
the passes of `stabnorm.ops.rows`, one after the other.
"""

import torch
from torch import Tensor

from stabnorm.functional import BatchMoments
from stabnorm.ops.dispatch import REFERENCE, op
from stabnorm.ops.rows import BatchMap, affine_of_rows, gradient_of_rows, moments_of_rows, sums_of_rows


@op("rows")
def affine_with_square(
    rows: Tensor, valid: Tensor | None, scale: Tensor, shift: Tensor | None, guess: bool = True
) -> tuple[Tensor, BatchMoments]:
    """`rows.affine_of_rows`, and `rows.moments_of_rows` of its input without centering.

    Without a `guess`, the map is not computed here but in `redo_affine_`.
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
    """`rows.gradient_of_rows` and `rows.sums_of_rows` of rows that are not centred; for `guess` see above."""
    dx = gradient_of_rows(dy, rows, valid, BatchMap(scale, slope, None, None)) if guess else torch.empty_like(rows)
    return dx, sums_of_rows(dy, rows, None, valid)


@op("rows")
def redo_gradient_(
    dx: Tensor, right: Tensor, dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor
) -> None:
    """Write `rows.gradient_of_rows` into ``dx`` unless the bool scalar ``right`` is set."""
    dx.copy_(gradient_of_rows(dy, rows, valid, BatchMap(scale, slope, None, None)))


def saves_a_read(rows: Tensor, valid: Tensor | None) -> bool:
    """Whether a backend computes map and sums in one read of these rows."""
    return affine_with_square.chosen(rows, valid) != REFERENCE


def worth_a_guess(rows: Tensor, step: Tensor, warmup: int) -> bool:
    """Whether the guess may be right. In a warm-up it is not, but only a CPU can read the step without a sync."""
    return rows.device.type != "cpu" or int(step) >= warmup
