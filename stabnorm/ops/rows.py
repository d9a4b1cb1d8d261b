"""The passes of a norm over its rows: batch moments, affine map, sums for the backward, and input gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from stabnorm import functional
from stabnorm.functional import BatchMoments
from stabnorm.functional.norms import ABSOLUTE_TO_STD, absolute_sums
from stabnorm.ops.dispatch import op

LOW_PRECISION = (torch.float16, torch.bfloat16)


class BatchMap(NamedTuple):
    """An affine map ``scale x + shift`` that depends on the batch, as its gradient needs it.

    Attributes:
        scale: ``[C]``, as are all.
        slope: see `functional.input_gradient`.
        offset: the same; None counts as 0.
        mean: what is subtracted from x before it is multiplied with `slope`; None counts as 0.
    """

    scale: Tensor
    slope: Tensor
    offset: Tensor | None
    mean: Tensor | None

    def deviations(self, rows: Tensor) -> Tensor:
        """Return the deviations of the rows from `mean`, in the precision of the statistics."""
        return widened(rows) if self.mean is None else widened(rows) - self.mean


def widened(rows: Tensor) -> Tensor:
    """Return rows in the precision of the statistics: float64 for float64, else float32."""
    return rows.float() if rows.dtype in LOW_PRECISION else rows


@op("rows")
def moments_of_rows(rows: Tensor, valid: Tensor | None, *, center: bool) -> BatchMoments:
    """`functional.batch_moments` of ``[R, C]`` in any floating dtype."""
    return functional.batch_moments(widened(rows), valid, center=center)


@op("rows")
def absolute_of_rows(rows: Tensor, mean: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """`functional.norms.absolute_sums` of the rows' deviations from `mean`, or of the rows where there is none."""
    wide = widened(rows)
    return absolute_sums(wide if mean is None else wide - mean, valid)


@op("rows")
def affine_of_rows(rows: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Return ``rows scale + shift`` in the dtype of the rows.

    >>> affine_of_rows(torch.ones(1, 2), torch.tensor([2.0, 3.0]), None)
    tensor([[2., 3.]])
    """
    wide = widened(rows)
    y = wide * scale if shift is None else torch.addcmul(shift, wide, scale)
    return y.to(rows.dtype)


@op("rows")
def sums_of_rows(
    dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`functional.upstream_sums` with the deviations of the rows from `mean`, or with the rows if it is None."""
    wide = widened(rows)
    return functional.upstream_sums(widened(dy), wide if mean is None else wide - mean, valid)


@op("rows")
def gradient_of_rows(dy: Tensor, rows: Tensor, valid: Tensor | None, of: BatchMap) -> Tensor:
    """`functional.input_gradient` in the dtype of the rows."""
    dx = functional.input_gradient(widened(dy), of.deviations(rows), valid, of.scale, of.slope, of.offset)
    return dx.to(rows.dtype)


@op("rows")
def gradient_of_signs(dy: Tensor, rows: Tensor, valid: Tensor | None, of: BatchMap) -> Tensor:
    """`gradient_of_rows` along the deviations' signs: ``scale dy - [valid] (slope sign(x - mean) + offset)``."""
    dx = functional.input_gradient(widened(dy), of.deviations(rows).sign(), valid, of.scale, of.slope, of.offset)
    return dx.to(rows.dtype)


def gradient_through_moments(
    dy: Tensor, rows: Tensor, valid: Tensor | None, of: BatchMap, moments: BatchMoments
) -> Tensor:
    """`gradient_of_rows` of a map that depends on these moments, which may be those of `absolute_moments`."""
    if moments.signs is None:
        return gradient_of_rows(dy, rows, valid, of)
    slope = of.slope * moments.square.sqrt() * ABSOLUTE_TO_STD
    offset = None if of.offset is None else of.offset - slope * moments.signs
    return gradient_of_signs(dy, rows, valid, BatchMap(of.scale, slope, offset, of.mean))
