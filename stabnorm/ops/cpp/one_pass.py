"""The C++ body of `one_pass`, see `cpp/one_pass.cpp`."""

import torch
from torch import Tensor

from stabnorm.functional import BatchMoments
from stabnorm.ops.cpp.library import TYPES, call


def affine_with_square(
    rows: Tensor, valid: Tensor | None, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, BatchMoments]:
    """See `ops.one_pass`."""
    rows, keep = rows.contiguous(), None if valid is None else valid.contiguous()
    y, square = torch.empty_like(rows), rows.new_empty(rows.shape[1], dtype=torch.float32)
    count = call(
        "affine_square", rows, TYPES[rows.dtype], *rows.shape, keep, _vector(scale),
        None if shift is None else _vector(shift), torch.get_num_threads(), y, square,
    )  # fmt: skip
    return y, BatchMoments(square.new_full((), count), None, square.div_(max(count, 1)))


def gradient_with_sums(
    dy: Tensor, rows: Tensor, valid: Tensor | None, scale: Tensor, slope: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See `ops.one_pass`."""
    rows, keep = rows.contiguous(), None if valid is None else valid.contiguous()
    dx, sums = torch.empty_like(rows), rows.new_empty(4, rows.shape[1], dtype=torch.float32)
    call(
        "gradient_sums", dy.to(rows.dtype).contiguous(), rows, TYPES[rows.dtype], *rows.shape, keep, _vector(scale),
        _vector(slope), torch.get_num_threads(), dx, sums,
    )  # fmt: skip
    return dx, sums.unbind()


def _vector(t: Tensor) -> Tensor:
    return t.detach().float().contiguous()
