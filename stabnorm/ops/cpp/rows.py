"""The C++ backend of `rows`, see `rows.cpp`. Its functions are ops, so that compiled graphs can call them."""

import torch
from torch import Tensor

from stabnorm._registration import registered
from stabnorm.functional import BatchMoments
from stabnorm.ops.cpp.library import call, empty_like, like, maybe_vector, maybe_whole, shape_of, vector
from stabnorm.ops.rows import BatchMap, affine_of_rows, gradient_of_rows, moments_of_rows, sums_of_rows


@moments_of_rows.backend("cpp", in_graphs=True)
def moments(rows: Tensor, valid: Tensor | None, *, center: bool) -> BatchMoments:
    """See `functional.batch_moments`."""
    mean, square, count = cpp_batch_moments(rows, valid, center).unbind()
    return BatchMoments(count[0], mean if center else None, square)


@registered(lambda rows, valid, center: rows.new_empty(3, rows.shape[1], dtype=torch.float32))
def cpp_batch_moments(rows: Tensor, valid: Tensor | None, center: bool) -> Tensor:
    """Return mean and mean square deviation of every column, and the number of valid rows: ``[3, C]``."""
    rows = rows.contiguous()
    out = rows.new_empty(3, rows.shape[1], dtype=torch.float32)
    threads = torch.get_num_threads()
    out[2] = call("batch_moments", rows, *shape_of(rows), maybe_whole(valid), center, threads, out[0], out[1])
    return out


@affine_of_rows.backend("cpp", in_graphs=True)
@registered(lambda rows, *_: empty_like(rows))
def cpp_affine(rows: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Return ``rows scale + shift``."""
    rows, y = rows.contiguous(), empty_like(rows)
    call("affine", rows, *shape_of(rows), vector(scale), maybe_vector(shift), torch.get_num_threads(), y)
    return y


@sums_of_rows.backend("cpp", in_graphs=True)
def sums(dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `functional.upstream_sums`."""
    plain, weighted, plain_valid, weighted_valid = cpp_sums(dy, rows, mean, valid).unbind()
    return plain, weighted, plain_valid, weighted_valid


@registered(lambda dy, rows, *_: rows.new_empty(4, rows.shape[1], dtype=torch.float32))
def cpp_sums(dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None) -> Tensor:
    """Return column sums of dy and of dy (rows - mean), over all rows and over the valid ones: ``[4, C]``."""
    rows = rows.contiguous()
    out = rows.new_empty(4, rows.shape[1], dtype=torch.float32)
    center = rows.new_zeros(rows.shape[1], dtype=torch.float32) if mean is None else vector(mean)
    threads = torch.get_num_threads()
    call("sums", like(rows, dy), rows, *shape_of(rows), maybe_whole(valid), center, threads, out)
    return out


@gradient_of_rows.backend("cpp", in_graphs=True)
@registered(lambda dy, rows, *_: empty_like(rows))
def cpp_gradient(dy: Tensor, rows: Tensor, valid: Tensor | None, of: BatchMap) -> Tensor:
    """See `functional.input_gradient`."""
    rows = rows.contiguous()
    dx, zero = empty_like(rows), rows.new_zeros(rows.shape[1], dtype=torch.float32)
    vectors = [zero if t is None else vector(t) for t in (of.mean, of.scale, of.slope, of.offset)]
    threads = torch.get_num_threads()
    call("gradient", like(rows, dy), rows, *shape_of(rows), maybe_whole(valid), *vectors, threads, dx)
    return dx
