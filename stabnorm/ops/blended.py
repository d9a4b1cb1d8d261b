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
from stabnorm.ops.rows import BatchMap, gradient_of_rows, sums_of_rows, widened


class LayerNormArgs(NamedTuple):
    """Gain and bias of the LayerNorm, ``[C]`` each, and its eps."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class TokenMoments(NamedTuple):
    """Mean and 1 / std of each token, ``[R]`` each in float32, from the forward."""

    mean: Tensor
    rstd: Tensor

    def normalize(self, rows: Tensor) -> Tensor:
        """Return LayerNorm's normalised input."""
        return (widened(rows) - self.mean[:, None]) * self.rstd[:, None]


class BlendedSums(NamedTuple):
    """Column sums ``[C]`` of a backward: over all rows, and over the valid ones; n is LayerNorm's normalised input."""

    plain: Tensor  # dy
    weighted: Tensor  # dy (x - mean)
    plain_valid: Tensor
    weighted_valid: Tensor
    through: Tensor  # dy n


@op("rows")
def blended_norm(
    lam: Tensor, rows: Tensor, own: LayerNormArgs, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`functional.blended_norm` in the dtype of the rows; means and 1 / std of the tokens are float32."""
    y, mean, rstd = functional.blended_norm(lam, widened(rows), *own, scale, shift)
    return y.to(rows.dtype), mean, rstd


@op("rows")
def blended_sums(
    lam: Tensor, dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None, tokens: TokenMoments
) -> BlendedSums:
    """Return the column sums that the gradients need; at lam = 1, unused sums may be 0."""
    through = functional.upstream_sums(widened(dy), tokens.normalize(rows), valid)[1]
    return BlendedSums(*sums_of_rows(dy, rows, mean, valid), through)


@op("rows")
def blended_gradient(
    lam: Tensor,
    dy: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    own: LayerNormArgs,
    of: BatchMap,
    tokens: TokenMoments,
    sums: BlendedSums,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the rows, and of LayerNorm's gain and bias.

    Args:
        lam: as in the forward.
        dy: upstream gradient.
        rows: the input.
        valid: which rows are valid.
        own: arguments of the LayerNorm.
        of: the affine map.
        tokens: from the forward.
        sums: from `blended_sums`.
    """
    of_rep = gradient_of_rows(widened(dy), widened(rows), valid, of)
    dx = functional.blended_gradient(lam, widened(dy), tokens.normalize(rows), tokens.rstd, own.weight, of_rep)
    return dx.to(rows.dtype), lam * sums.through, lam * sums.plain
