"""PowerNorm's GroupScaling, which divides each group of a token's channels by its rms, and its gradient."""

import torch
from torch import Tensor

from stabnorm.ops.dispatch import op
from stabnorm.ops.rows import widened


@op("rows")
def scaled_groups(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """`functional.scale_groups` in the dtype of the rows, and the factors 1 / rms, ``[R, groups]``."""
    grouped = widened(rows.unflatten(-1, (groups, -1)))
    size = torch.linalg.vector_norm(grouped, 2, -1, keepdim=True)
    r = torch.rsqrt(size.square() / grouped.shape[-1] + eps)
    return (grouped * r).to(rows.dtype).flatten(-2), r.squeeze(-1)


@op("y")
def gradient_of_groups(dy: Tensor, y: Tensor, r: Tensor, masked: bool) -> Tensor:
    r"""Dx of `scaled_groups`. If `masked`, dx is 0 where dy is 0, because padding may hold NaN.

    .. math:: dx = (dy - y\,\overline{dy\,y})\, r
    """
    shape = (r.shape[-1], -1)
    grouped, scaled = widened(dy).unflatten(-1, shape), widened(y).unflatten(-1, shape)
    along = (grouped * scaled).mean(-1, keepdim=True)
    dx = torch.addcmul(grouped, scaled, along, value=-1).mul_(r[..., None])
    if masked:
        dx = torch.where((grouped == 0).all(-1, keepdim=True), 0, dx)
    return dx.to(dy.dtype).flatten(-2)
