"""The ATen backend of `blended`: LayerNorm's own kernels compute one half, and the other half is added in place."""

import torch
from torch import Tensor

from stabnorm.ops.aten import rows as rows_
from stabnorm.ops.blended import (
    BlendedSums,
    LayerNormArgs,
    TokenMoments,
    blended_gradient,
    blended_norm,
    blended_sums,
)
from stabnorm.ops.rows import BatchMap, affine_of_rows


@blended_norm.backend("aten", masks=False)
def norm(
    lam: Tensor, rows: Tensor, own: LayerNormArgs, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `functional.blended_norm`; this is LayerNorm with a weighted gain and all constants as its bias, plus a x."""
    share = float(lam)
    if share == 1:
        return own_norm(rows, own)
    if share == 0:
        token = rows.new_empty(len(rows), dtype=torch.float32)
        return affine_of_rows(rows, scale, shift), token, token
    y, *tokens = own_norm(rows, weighted(own, share, shift, scale))
    _add_products_(y, [(rows, (1 - share) * scale)])
    return y, tokens[0], tokens[1]


@blended_sums.backend("aten", masks=False)
def sums(
    lam: Tensor, dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None, tokens: TokenMoments
) -> BlendedSums:
    """Return the column sums of dy and of dy (rows - mean); at lam = 1 they are not needed.

    LayerNorm's own backward returns the sum of dy n.
    """
    if float(lam) == 1:
        zero = dy.new_zeros(rows.shape[1], dtype=torch.float32)
        return BlendedSums(zero, zero, zero, zero, zero)
    plain, weighted = rows_.sums(dy, rows, mean)
    return BlendedSums(plain, weighted, plain, weighted, plain)


@blended_gradient.backend("aten", masks=False)
def gradient(
    lam: Tensor,
    dy: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    own: LayerNormArgs,
    of: BatchMap,
    tokens: TokenMoments,
    sums: BlendedSums,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.blended.blended_gradient`."""
    share = float(lam)
    if share == 1:
        return own_gradient(dy, rows, own, tokens)
    constant = rows_.constant_of(of)
    if share == 0:
        nothing = torch.zeros_like(of.scale)
        return rows_.gradient(dy, rows, of.scale, -of.slope, constant), nothing, nothing
    dx, of_weight, _ = own_gradient(dy, rows, weighted(own, share, None, of.scale), tokens)
    _add_products_(dx, [(dy, (1 - share) * of.scale), (rows, (share - 1) * of.slope)], (1 - share) * constant)
    return dx, share * of_weight, share * sums.plain


def weighted(own: LayerNormArgs, share: float, shift: Tensor | None, like: Tensor) -> LayerNormArgs:
    """Return the arguments of ``share LayerNorm(x) + (1 - share) shift``, in float32."""
    gain = torch.ones_like(like) if own.weight is None else own.weight.float()
    constant = torch.zeros_like(like) if shift is None else (1 - share) * shift
    if own.bias is not None:
        constant = constant.add(own.bias.float(), alpha=share)
    return LayerNormArgs(share * gain, constant, own.eps)


def own_norm(rows: Tensor, own: LayerNormArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Return LayerNorm's own output, bit for bit, and its statistics of the tokens, ``[R]`` in float32."""
    y, mean, rstd = torch.native_layer_norm(rows, [rows.shape[1]], *own)
    return y, mean.flatten().float(), rstd.flatten().float()


def own_gradient(dy: Tensor, rows: Tensor, own: LayerNormArgs, tokens: TokenMoments) -> tuple[Tensor, Tensor, Tensor]:
    """Return LayerNorm's own gradients, bit for bit."""
    weight, bias, _ = own
    kept_in = rows.dtype if weight is None else weight.dtype  # the forward rounded the tokens to this
    weight = torch.ones(rows.shape[1], dtype=kept_in) if weight is None else weight
    bias = torch.zeros_like(weight) if bias is None else bias  # its values do not matter
    dx, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
        dy, rows, [rows.shape[1]], tokens.mean.to(kept_in)[:, None], tokens.rstd.to(kept_in)[:, None], weight, bias,
        [True, True, True],
    )  # fmt: skip
    return dx, of_weight, of_bias


def _add_products_(y: Tensor, products: list[tuple[Tensor, Tensor]], constant: Tensor | None = None) -> None:
    """Add ``rows * vector`` for each pair, and the constant, to ``y`` in place, one block at a time."""
    work = wide = None
    if y.dtype != torch.float32:
        work, wide = rows_.scratch(y), rows_.scratch(y)
    for out, *factors in rows_.blocks(y, *(rows for rows, _ in products)):
        into = out if work is None else work[: len(out)].copy_(out)
        for factor, (_, vector) in zip(factors, products, strict=True):
            into.addcmul_(factor if wide is None else wide[: len(out)].copy_(factor), vector)
        if constant is not None:
            into.add_(constant)
        if work is not None:
            out.copy_(into)
