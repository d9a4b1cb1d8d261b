"""The passes of PRepBN over its rows, both norms at once: output, the backward's column sums, the gradients.

The formulas are `functional.blended_norm` and `functional.blended_gradient`. Ask ``blended_norm.chosen`` for a backend
and run all three ops ``on`` it, because a backward takes its forward's. In the backends for CPUs lam = 1 gives
LayerNorm's own bits in both directions. What the branch of weight 0 holds, NaN too, reaches no result.
"""

from typing import NamedTuple

from torch import Tensor

from stabnorm import functional
from stabnorm.ops.dispatch import op
from stabnorm.ops.rows import gradient_of_rows, sums_of_rows, widened


class BlendedSums(NamedTuple):
    """Column sums ``[C]`` of a backward: over all rows, and over the valid ones; n is LayerNorm's normalised input."""

    plain: Tensor  # dy
    weighted: Tensor  # dy (x - mean)
    plain_valid: Tensor
    weighted_valid: Tensor
    through: Tensor  # dy n


@op("rows")
def blended_norm(
    lam: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`functional.blended_norm` in the dtype of the rows; means and 1 / std of the tokens are float32."""
    y, mean, rstd = functional.blended_norm(lam, widened(rows), weight, bias, eps, scale, shift)
    return y.to(rows.dtype), mean, rstd


@op("rows")
def blended_sums(
    lam: Tensor,
    dy: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    valid: Tensor | None,
    token_mean: Tensor,
    token_rstd: Tensor,
) -> BlendedSums:
    """The column sums that the gradients need; at lam = 1 those that do not matter may be 0."""
    sums = sums_of_rows(dy, rows, mean, valid)
    normalized = (widened(rows) - token_mean[:, None]) * token_rstd[:, None]
    return BlendedSums(*sums, functional.upstream_sums(widened(dy), normalized, valid)[1])


@op("rows")
def blended_gradient(
    lam: Tensor,
    dy: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    mean: Tensor | None,
    valid: Tensor | None,
    slope: Tensor,
    offset: Tensor | None,
    token_mean: Tensor,
    token_rstd: Tensor,
    sums: BlendedSums,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows, and of LayerNorm's gain and bias.

    Args:
        lam: as in the forward.
        dy: upstream gradient.
        rows: the input.
        weight: LayerNorm's gain.
        bias: LayerNorm's bias.
        scale: of the affine map.
        mean: see `functional.input_gradient`, as are valid, slope and offset: for the affine map alone.
        valid: rows that count.
        slope: of the affine map's dependence on the batch.
        offset: the same.
        token_mean: from the forward.
        token_rstd: from the forward.
        sums: from `blended_sums`.
    """
    of_rep = widened(gradient_of_rows(widened(dy), widened(rows), mean, valid, scale, slope, offset))
    normalized = (widened(rows) - token_mean[:, None]) * token_rstd[:, None]
    dx = functional.blended_gradient(lam, widened(dy), normalized, token_rstd, weight, of_rep)
    return dx.to(rows.dtype), lam * sums.through, lam * sums.plain
