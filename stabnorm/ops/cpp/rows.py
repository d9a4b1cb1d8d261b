"""The C++ body of `rows`, see `cpp/rows.cpp`. Ops of the dispatcher, so that compiled graphs call them, too."""

import torch
from torch import Tensor

from stabnorm.functional import BatchMoments
from stabnorm.ops._register import registered
from stabnorm.ops.cpp.library import TYPES, call


def moments(rows: Tensor, valid: Tensor | None, center: bool) -> BatchMoments:
    """See `functional.batch_moments`."""
    found = cpp_batch_moments(rows, valid, center)
    count, mean, square = found[-1, 0], found[0], found[1]
    return BatchMoments(count, mean if center else None, square)


@registered(
    "(Tensor rows, Tensor? valid, bool center) -> Tensor",
    lambda rows, valid, center: rows.new_empty(3, rows.shape[1], dtype=torch.float32),
)
def cpp_batch_moments(rows: Tensor, valid: Tensor | None, center: bool) -> Tensor:
    """Mean and mean square deviation of every column, and the number of valid rows in the third line: ``[3, C]``."""
    rows, valid = rows.contiguous(), None if valid is None else valid.contiguous()
    out = rows.new_empty(3, rows.shape[1], dtype=torch.float32)
    count = call("batch_moments", rows, *_shape(rows), valid, center, torch.get_num_threads(), out[0], out[1])
    out[2] = count
    return out


@registered("(Tensor rows, Tensor scale, Tensor? shift) -> Tensor", lambda rows, *_: _empty(rows))
def cpp_affine(rows: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """``rows scale + shift``."""
    rows, y = rows.contiguous(), _empty(rows)
    call("affine", rows, *_shape(rows), _vector(scale), _maybe(shift), torch.get_num_threads(), y)
    return y


def sums(dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `functional.upstream_sums`."""
    plain, weighted, plain_valid, weighted_valid = cpp_sums(dy, rows, mean, valid).unbind()
    return plain, weighted, plain_valid, weighted_valid


@registered(
    "(Tensor dy, Tensor rows, Tensor? mean, Tensor? valid) -> Tensor",
    lambda dy, rows, *_: rows.new_empty(4, rows.shape[1], dtype=torch.float32),
)
def cpp_sums(dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None) -> Tensor:
    """Column sums of dy and of dy (rows - mean), over all rows and over the valid ones: ``[4, C]``."""
    rows, valid = rows.contiguous(), None if valid is None else valid.contiguous()
    out = rows.new_empty(4, rows.shape[1], dtype=torch.float32)
    center = rows.new_zeros(rows.shape[1], dtype=torch.float32) if mean is None else _vector(mean)
    call("sums", _like(dy, rows), rows, *_shape(rows), valid, center, torch.get_num_threads(), out)
    return out


@registered(
    "(Tensor dy, Tensor rows, Tensor? mean, Tensor? valid, Tensor scale, Tensor slope, Tensor? offset) -> Tensor",
    lambda dy, rows, *_: _empty(rows),
)
def cpp_gradient(
    dy: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    valid: Tensor | None,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor | None,
) -> Tensor:
    """See `functional.input_gradient`."""
    rows, valid = rows.contiguous(), None if valid is None else valid.contiguous()
    dx, zero = _empty(rows), rows.new_zeros(rows.shape[1], dtype=torch.float32)
    vectors = [zero if t is None else _vector(t) for t in (mean, scale, slope, offset)]
    call("gradient", _like(dy, rows), rows, *_shape(rows), valid, *vectors, torch.get_num_threads(), dx)
    return dx


@registered(
    "(Tensor rows, int groups, float eps) -> (Tensor, Tensor)",
    lambda rows, groups, eps: (_empty(rows), rows.new_empty(len(rows), groups, dtype=torch.float32)),
)
def cpp_scale_groups(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """See `functional.scale_groups`; and what it multiplied with."""
    rows = rows.contiguous()
    y, r = _empty(rows), rows.new_empty(len(rows), groups, dtype=torch.float32)
    call("scale_groups", rows, *_shape(rows), groups, eps, torch.get_num_threads(), y, r)
    return y, r


@registered("(Tensor dy, Tensor y, Tensor r) -> Tensor", lambda dy, y, r: _empty(y))
def cpp_gradient_of_groups(dy: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """See `ops.rows.gradient_of_groups`."""
    dx = _empty(y)
    call("scale_groups_gradient", _like(dy, y), y, *_shape(y), r.shape[1], r, torch.get_num_threads(), dx)
    return dx


def _shape(rows: Tensor) -> tuple[int, int, int]:
    return TYPES[rows.dtype], rows.shape[0], rows.shape[1]


def _empty(rows: Tensor) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _vector(t: Tensor) -> Tensor:
    return t.detach().float().contiguous()


def _maybe(t: Tensor | None) -> Tensor | None:
    return None if t is None else _vector(t)


def _like(dy: Tensor, rows: Tensor) -> Tensor:
    return dy.to(rows.dtype).contiguous()
