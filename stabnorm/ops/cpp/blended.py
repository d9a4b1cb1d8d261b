"""The C++ backend of `blended`, see `rows.cpp`. At lam = 1 only ATen's LayerNorm runs, at 0 only the affine map."""

import torch
from torch import Tensor

from stabnorm._registration import registered
from stabnorm.ops.aten import blended as aten
from stabnorm.ops.blended import (
    BlendedSums,
    LayerNormArgs,
    TokenMoments,
    blended_gradient,
    blended_norm,
    blended_sums,
)
from stabnorm.ops.cpp import rows as rows_
from stabnorm.ops.cpp.library import call, maybe_whole, shape_of
from stabnorm.ops.rows import BatchMap


@blended_norm.backend("cpp", in_graphs=True)
@registered(lambda lam, rows, *_: (torch.empty_like(rows), _floats(rows, len(rows)), _floats(rows, len(rows))))
def cpp_blended_norm(
    lam: Tensor, rows: Tensor, own: LayerNormArgs, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `functional.blended_norm`."""
    share, rows = float(lam), rows.contiguous()
    if share == 1:
        return aten.own_norm(rows, own)
    means, scales = _floats(rows, len(rows)), _floats(rows, len(rows))
    if share == 0:
        return rows_.cpp_affine(rows, scale, shift), means, scales
    gain, constant, eps = aten.weighted(own, share, shift, scale)
    y, vectors = torch.empty_like(rows), (gain, (1 - share) * scale, constant)
    call("blend", rows, *shape_of(rows), eps, *vectors, torch.get_num_threads(), y, means, scales)
    return y, means, scales


@blended_sums.backend("cpp", in_graphs=True)
def sums(
    lam: Tensor, dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None, tokens: TokenMoments
) -> BlendedSums:
    """See `ops.blended.blended_sums`."""
    sums = cpp_blended_sums(lam, dy, rows, mean, valid, tokens).unbind()
    return BlendedSums(sums[0], sums[1], sums[3], sums[4], sums[2])


@registered(lambda lam, dy, rows, *_: rows.new_empty(6, rows.shape[1], dtype=torch.float32))
def cpp_blended_sums(
    lam: Tensor, dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None, tokens: TokenMoments
) -> Tensor:
    """Return column sums of dy, dy (x - mean) and dy n, over all rows and over the valid ones: ``[6, C]``."""
    rows, dy, valid = rows.contiguous(), dy.contiguous(), maybe_whole(valid)
    out = rows.new_zeros(6, rows.shape[1], dtype=torch.float32)
    share = float(lam)
    if share == 0:
        out[[0, 1, 3, 4]] = rows_.cpp_sums(dy, rows, mean, valid)
    elif share < 1:  # at 1 these sums are not needed
        center = torch.zeros_like(out[0]) if mean is None else mean
        call("blend_sums", dy, rows, *shape_of(rows), valid, center, *tokens, torch.get_num_threads(), out)
    return out


@blended_gradient.backend("cpp", in_graphs=True)
@registered(
    lambda lam, dy, rows, *rest: (torch.empty_like(rows), _floats(rows, rows.shape[1]), _floats(rows, rows.shape[1]))
)
def cpp_blended_gradient(
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
    rows, dy, valid = rows.contiguous(), dy.contiguous(), maybe_whole(valid)
    share = float(lam)
    if share == 1:
        dx, of_weight, of_bias = aten.own_gradient(dy, rows, own, tokens)
        return dx, of_weight.float(), of_bias.float()
    zero = torch.zeros_like(of.scale)
    if share == 0:
        return rows_.cpp_gradient(dy, rows, valid, of), zero, zero.clone()
    gain = share * (torch.ones_like(zero) if own.weight is None else own.weight.float())
    of_rep = [zero if t is None else (1 - share) * t for t in (of.scale, of.slope, of.offset)]
    dx, center = torch.empty_like(rows), zero if of.mean is None else of.mean
    vectors = (center, *tokens, gain, *of_rep)
    call("blend_gradient", dy, rows, *shape_of(rows), valid, *vectors, torch.get_num_threads(), dx)
    return dx, share * sums.through, share * sums.plain


def _floats(rows: Tensor, size: int) -> Tensor:
    return rows.new_empty(size, dtype=torch.float32)
