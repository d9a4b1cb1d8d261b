"""The passes of a norm over its rows: the batch's moments, the affine map, the backward's sums, the input's gradient.

Each is a formula of `stabnorm.functional`, or a faster body that equals it: `stabnorm.ops.dispatch` says which.
"""

import torch
from torch import Tensor

from stabnorm import functional
from stabnorm.functional import BatchMoments
from stabnorm.ops.dispatch import execution

LOW_PRECISION = (torch.float16, torch.bfloat16)


def widened(rows: Tensor) -> Tensor:
    """In the precision statistics are computed in: float32, float64 for float64."""
    return rows.float() if rows.dtype in LOW_PRECISION else rows


def moments_of_rows(rows: Tensor, valid: Tensor | None, *, center: bool) -> BatchMoments:
    """`functional.batch_moments` of ``[R, C]`` in any floating dtype."""
    body = execution("moments_of_rows", rows, valid)
    if body == "triton":
        from stabnorm.ops.triton import rows as _triton_rows

        return _triton_rows.moments(rows, valid, center)
    if body == "cpp":
        from stabnorm.ops.cpp import rows as _cpp_rows

        return _cpp_rows.moments(rows, valid, center)
    if body == "aten":
        from stabnorm.ops.aten import rows as _cpu_rows

        return _cpu_rows.moments(rows, center)
    return functional.batch_moments(widened(rows), valid, center=center)


def affine_of_rows(rows: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """``rows scale + shift`` in the dtype of the rows.

    >>> affine_of_rows(torch.ones(1, 2), torch.tensor([2.0, 3.0]), None)
    tensor([[2., 3.]])
    """
    body = execution("affine_of_rows", rows)
    if body == "triton":
        from stabnorm.ops.triton import rows as _triton_rows

        return _triton_rows.affine(rows, scale, shift)
    if body == "cpp":
        from stabnorm.ops.cpp import rows as _cpp_rows

        return _cpp_rows.cpp_affine(rows, scale, shift)
    if body == "aten" and rows.dtype in LOW_PRECISION:
        from stabnorm.ops.aten import rows as _cpu_rows

        return _cpu_rows.affine(rows, scale, shift)
    wide = widened(rows)
    y = wide * scale if shift is None else torch.addcmul(shift, wide, scale)
    return y.to(rows.dtype)


def sums_of_rows(
    dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`functional.upstream_sums` with the rows' deviations from `mean`, or the rows where there is none."""
    body = execution("sums_of_rows", rows, valid)
    if body == "triton":
        from stabnorm.ops.triton import rows as _triton_rows

        return _triton_rows.sums(dy, rows, mean, valid)
    if body == "cpp":
        from stabnorm.ops.cpp import rows as _cpp_rows

        return _cpp_rows.sums(dy, rows, mean, valid)
    if body == "aten":
        from stabnorm.ops.aten import rows as _cpu_rows

        return _cpu_rows.sums(dy, rows, mean) * 2
    wide = widened(rows)
    return functional.upstream_sums(widened(dy), wide if mean is None else wide - mean, valid)


def gradient_of_rows(
    dy: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    valid: Tensor | None,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor | None,
) -> Tensor:
    """`functional.input_gradient` in the dtype of the rows."""
    body = execution("gradient_of_rows", rows, valid)
    if body == "triton":
        from stabnorm.ops.triton import rows as _triton_rows

        return _triton_rows.gradient(dy, rows, mean, valid, scale, slope, offset)
    if body == "cpp":
        from stabnorm.ops.cpp import rows as _cpp_rows

        return _cpp_rows.cpp_gradient(dy, rows, mean, valid, scale, slope, offset)
    if body == "aten":
        from stabnorm.ops.aten import rows as _cpu_rows

        shift = torch.zeros_like(slope) if mean is None else slope * mean
        return _cpu_rows.gradient(dy, rows, scale, -slope, shift if offset is None else shift - offset)
    wide = widened(rows)
    deviations = wide if mean is None else wide - mean
    return functional.input_gradient(widened(dy), deviations, valid, scale, slope, offset).to(rows.dtype)


def scaled_groups(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """`functional.scale_groups` in the dtype of the rows, and what it multiplied with, ``[R, groups]``."""
    body = execution("scale_groups", rows)
    if body == "triton":
        from stabnorm.ops.triton import groups as _triton_groups

        return _triton_groups.scaled(rows, groups, eps)
    if body == "cpp":
        from stabnorm.ops.cpp import rows as _cpp_rows

        return _cpp_rows.cpp_scale_groups(rows, groups, eps)
    grouped = widened(rows.unflatten(-1, (groups, -1)))
    size = torch.linalg.vector_norm(grouped, 2, -1, keepdim=True)
    r = torch.rsqrt(size.square() / grouped.shape[-1] + eps)
    return (grouped * r).to(rows.dtype).flatten(-2), r.squeeze(-1)


def gradient_of_groups(dy: Tensor, y: Tensor, r: Tensor, masked: bool) -> Tensor:
    r"""Dx of `scaled_groups`; padding, which may hold NaN, gets 0 where 0 comes back to it.

    .. math:: dx = (dy - y\,\overline{dy\,y})\, r
    """
    body = execution("scale_groups", y)
    if body == "triton":
        from stabnorm.ops.triton import groups as _triton_groups

        return _triton_groups.gradient(dy, y, r, masked)
    if body == "cpp":
        from stabnorm.ops.cpp import rows as _cpp_rows

        return _cpp_rows.cpp_gradient_of_groups(dy, y, r)
    shape = (r.shape[-1], -1)
    grouped, scaled = widened(dy).unflatten(-1, shape), widened(y).unflatten(-1, shape)
    along = (grouped * scaled).mean(-1, keepdim=True)
    dx = torch.addcmul(grouped, scaled, along, value=-1).mul_(r[..., None])
    if masked:
        dx = torch.where((grouped == 0).all(-1, keepdim=True), 0, dx)
    return dx.to(dy.dtype).flatten(-2)
