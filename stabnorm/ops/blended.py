"""The passes of PRepBN over its rows, with both norms at once: output, column sums for the backward, and gradients.

The formulas are `functional.blended_norm` and `functional.blended_gradient`. Ask ``blended_norm.chosen`` for a backend,
and run all three ops ``on`` it, because a backward needs the backend of its forward. With the CPU backends, lam = 1
gives the same bits as LayerNorm in forward and backward. A branch of weight 0 never reaches a result, even if it holds
NaN.
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
    """Return the column sums that the gradients need; at lam = 1, unused sums may be 0."""
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
    """Return the gradients of the rows, and of LayerNorm's gain and bias.

    Args:
        lam: as in the forward.
        dy: upstream gradient.
        rows: the input.
        weight: LayerNorm's gain.
        bias: LayerNorm's bias.
        scale: scale of the affine map.
        mean: mean of the affine map's input, see `functional.input_gradient`.
        valid: which rows are valid.
        slope: how the affine map depends on the batch, see `functional.input_gradient`.
        offset: see `functional.input_gradient`.
        token_mean: mean of each token, from the forward.
        token_rstd: 1 / std of each token, from the forward.
        sums: from `blended_sums`.
    """
    of_rep = widened(gradient_of_rows(widened(dy), widened(rows), mean, valid, scale, slope, offset))
    normalized = (widened(rows) - token_mean[:, None]) * token_rstd[:, None]
    dx = functional.blended_gradient(lam, widened(dy), normalized, token_rstd, weight, of_rep)
    return dx.to(rows.dtype), lam * sums.through, lam * sums.plain
