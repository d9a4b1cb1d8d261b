"""The passes of PRepBN over its rows, both norms at once: output, the backward's column sums, the gradients.

The formulas are `functional.blended_norm` and `functional.blended_gradient`; `stabnorm.ops.dispatch` says which body
runs, under the name "blended_norm" for all three, and a backward takes its forward's. In the bodies for CPUs lam = 1
gives LayerNorm's own bits, there and back; what the branch of weight 0 holds, NaN too, goes nowhere.
"""

from typing import NamedTuple

from torch import Tensor

from stabnorm import functional
from stabnorm.ops.rows import gradient_of_rows, sums_of_rows, widened


class BlendedSums(NamedTuple):
    """Column sums ``[C]`` of a backward: over all rows, and over the valid ones; n is LayerNorm's normalised input."""

    plain: Tensor  # dy
    weighted: Tensor  # dy (x - mean)
    plain_valid: Tensor
    weighted_valid: Tensor
    through: Tensor  # dy n


def blended_norm(
    body: str,
    lam: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`functional.blended_norm` in the dtype of the rows; means and 1 / std of the tokens are float32."""
    if body == "triton":
        from stabnorm.ops.triton import blended as _triton_blended

        return _triton_blended.norm(lam, rows, weight, bias, eps, scale, shift)
    if body == "cpp":
        from stabnorm.ops.cpp import blended as _cpp_blended

        return _cpp_blended.cpp_blended_norm(lam, rows, weight, bias, eps, scale, shift)
    if body == "aten":
        from stabnorm.ops.aten import blended as _cpu_blended

        return _cpu_blended.norm(lam, rows, weight, bias, eps, scale, shift)
    y, mean, rstd = functional.blended_norm(lam, widened(rows), weight, bias, eps, scale, shift)
    return y.to(rows.dtype), mean, rstd


def blended_sums(
    body: str,
    lam: Tensor,
    dy: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    valid: Tensor | None,
    token_mean: Tensor,
    token_rstd: Tensor,
) -> BlendedSums:
    """The column sums that the gradients need; at lam = 1 those that do not matter may be 0."""
    if body == "triton":
        from stabnorm.ops.triton import blended as _triton_blended

        return BlendedSums(*_triton_blended.sums(dy, rows, mean, valid, token_mean, token_rstd))
    if body == "cpp":
        from stabnorm.ops.cpp import blended as _cpp_blended

        sums = _cpp_blended.cpp_blended_sums(lam, dy, rows, mean, valid, token_mean, token_rstd).unbind()
        return BlendedSums(sums[0], sums[1], sums[3], sums[4], sums[2])
    if body == "aten":
        from stabnorm.ops.aten import blended as _cpu_blended

        plain, weighted = _cpu_blended.sums(lam, dy, rows, mean)
        return BlendedSums(plain, weighted, plain, weighted, plain)  # LayerNorm's own backward brings the last
    found = sums_of_rows(dy, rows, mean, valid)
    normalized = (widened(rows) - token_mean[:, None]) * token_rstd[:, None]
    return BlendedSums(*found, functional.upstream_sums(widened(dy), normalized, valid)[1])


def blended_gradient(
    body: str,
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
        body: the execution that the forward took.
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
    if body == "triton":
        from stabnorm.ops.triton import blended as _triton_blended

        return _triton_blended.gradient(
            lam, dy, rows, weight, scale, mean, valid, slope, offset, token_mean, token_rstd, sums.through, sums.plain
        )
    if body == "cpp":
        from stabnorm.ops.cpp import blended as _cpp_blended

        return _cpp_blended.cpp_blended_gradient(
            lam, dy, rows, weight, bias, scale, mean, valid, slope, offset, token_mean, token_rstd, sums.plain,
            sums.through,
        )  # fmt: skip
    if body == "aten":
        from stabnorm.ops.aten import blended as _cpu_blended

        return _cpu_blended.gradient(
            lam, dy, rows, weight, bias, scale, mean, slope, offset, token_mean, token_rstd, sums.plain
        )
    of_rep = widened(gradient_of_rows(widened(dy), widened(rows), mean, valid, scale, slope, offset))
    normalized = (widened(rows) - token_mean[:, None]) * token_rstd[:, None]
    dx = functional.blended_gradient(lam, widened(dy), normalized, token_rstd, weight, of_rep)
    return dx.to(rows.dtype), lam * sums.through, lam * sums.plain
