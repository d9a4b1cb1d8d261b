"""The ATen backend of `rows`: few passes with ATen's vectorised primitives.

Most work is done by `native_batch_norm_backward`. Two of its three results are the column sums of a and of a b, in one
read. It splits the work among threads by rows, as elementwise ops do, so each thread finds in its own cache what it has
just written. A sum over dim 0 splits by columns: with it, the moments took twice as long at 8192 x 384 on two threads.
It accumulates in float32 along the rows. So it gets one block at a time, and intermediate results stay in the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from stabnorm.functional import BatchMoments
from stabnorm.ops.rows import (
    LOW_PRECISION,
    BatchMap,
    absolute_of_rows,
    affine_of_rows,
    gradient_of_rows,
    gradient_of_signs,
    moments_of_rows,
    sums_of_rows,
)

BLOCK = 2**19  # numbers; two megabytes in float32
WIDTH = 1024  # width of a row of partial sums; a much wider row does not fit the innermost cache


def _block_rows(channels: int) -> int:
    return max(1, BLOCK // channels)


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of each tensor, one block at a time."""
    return zip(*(t.split(_block_rows(t.shape[1])) for t in tensors), strict=True)


def scratch(rows: Tensor) -> Tensor:
    """Return float32 memory for a block."""
    size = min(len(rows), _block_rows(rows.shape[1]))
    return rows.new_empty(size, rows.shape[1], dtype=torch.float32)


def _column_sums(a: Tensor, b: Tensor, origin: Tensor, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Return sums over rows of ``a`` and of ``a (b - origin)``: the gradients of a batch norm with rstd 1.

    The primitive accumulates in float32, row after row. Several narrow rows are treated as one wide row, so that a sum
    has only some hundred terms and keeps six digits.
    """
    folds = max(1, min(width // a.shape[1], len(a)))
    whole = len(a) // folds * folds
    wide = folds * a.shape[1]
    origin_of_all = origin.repeat(folds)
    one = torch.ones_like(origin_of_all)
    _, products, totals = torch.ops.aten.native_batch_norm_backward(
        a[:whole].reshape(-1, wide), b[:whole].reshape(-1, wide), one, None, None, origin_of_all, one, True, 0.0,
        [False, True, True],
    )  # fmt: skip
    plain, weighted = totals.view(folds, -1).sum(0), products.view(folds, -1).sum(0)
    if whole < len(a):
        rest = _column_sums(a[whole:], b[whole:], origin, width)
        return plain + rest[0], weighted + rest[1]
    return plain, weighted


@moments_of_rows.backend("aten", masks=False)
def moments(rows: Tensor, valid: Tensor | None, *, center: bool) -> BatchMoments:
    """See `functional.batch_moments`.

    The mean of the first block is subtracted from all blocks. If this block has a share f of the rows, its mean differs
    from the mean of all rows by at most sqrt(1 / f) standard deviations. So the correction at the end loses no digits.
    """
    memory = scratch(rows)
    total, square, zero = memory.new_zeros(3, rows.shape[1])
    origin: Tensor | None = None
    for (block,) in blocks(rows):
        work = memory[: len(block)]
        wide = block if block.dtype == torch.float32 else work.copy_(block)
        if center:
            origin = wide.mean(0) if origin is None else origin
            wide = torch.sub(wide, origin, out=work)
        sums = _column_sums(wide, wide, zero)
        total += sums[0]
        square += sums[1]
    count = memory.new_full((), len(rows))
    if origin is None:
        return BatchMoments(count, None, square / count)
    rest = total / count
    return BatchMoments(count, origin + rest, (square / count - rest * rest).clamp(min=0))


@absolute_of_rows.backend("aten", masks=False)
def absolute(rows: Tensor, mean: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `functional.norms.absolute_sums`; a deviation times its sign is its magnitude, and NaN where it is NaN."""
    work, memory = scratch(rows), scratch(rows)
    total, balance, zero = memory.new_zeros(3, rows.shape[1])
    for (block,) in blocks(rows):
        deviations = work[: len(block)].copy_(block) if mean is None else _deviations(block, mean, work)
        signs = torch.sign(deviations, out=memory[: len(block)])
        # The sums are shorter than elsewhere: all magnitudes share the low bits of the mean, so rounding has a bias.
        sums = _column_sums(signs, deviations, zero, 4 * WIDTH)
        balance += sums[0]
        total += sums[1]
    return total, balance


def _deviations(block: Tensor, mean: Tensor, memory: Tensor) -> Tensor:
    return torch.sub(block, mean, out=memory[: len(block)])


@affine_of_rows.backend("aten")
def affine(rows: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Return ``rows scale + shift``; in float32 the formula is as fast."""
    if rows.dtype not in LOW_PRECISION:
        return affine_of_rows.formula(rows, scale, shift)
    y, memory = torch.empty_like(rows), scratch(rows)
    for block, out in blocks(rows, y):
        work = memory[: len(block)]
        work.copy_(block)
        if shift is None:
            work.mul_(scale)
        else:
            torch.addcmul(shift, work, scale, out=work)
        out.copy_(work)
    return y


@sums_of_rows.backend("aten", masks=False)
def upstream_sums(
    dy: Tensor, rows: Tensor, mean: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `functional.upstream_sums`."""
    plain, weighted = sums(dy, rows, mean)
    return plain, weighted, plain, weighted


def sums(dy: Tensor, rows: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the column sums of ``dy`` and of ``dy (rows - mean)``."""
    plain, weighted, zero = rows.new_zeros(3, rows.shape[1], dtype=torch.float32)
    for upstream, block in blocks(dy, rows):
        sums = _column_sums(upstream.float(), block.float(), zero if mean is None else mean)
        plain += sums[0]
        weighted += sums[1]
    return plain, weighted


@gradient_of_rows.backend("aten", masks=False)
def input_gradient(dy: Tensor, rows: Tensor, valid: Tensor | None, of: BatchMap) -> Tensor:
    """See `functional.input_gradient`."""
    return gradient(dy, rows, of.scale, -of.slope, constant_of(of))


@gradient_of_signs.backend("aten", masks=False)
def sign_gradient(dy: Tensor, rows: Tensor, valid: Tensor | None, of: BatchMap) -> Tensor:
    """See `functional.input_gradient`."""
    dx, work, wide = torch.empty_like(rows), scratch(rows), scratch(rows)
    mean, slope = of.mean, of.slope
    shift = torch.zeros_like(slope) if of.offset is None else -of.offset
    for upstream, block, out in blocks(dy, rows, dx):
        signs = (work[: len(block)].copy_(block) if mean is None else _deviations(block, mean, work)).sign_()
        torch.addcmul(shift, signs, slope, value=-1, out=signs)
        up = upstream if upstream.dtype == torch.float32 else wide[: len(block)].copy_(upstream)
        if out.dtype == torch.float32:
            torch.addcmul(signs, up, of.scale, out=out)
        else:
            out.copy_(signs.addcmul_(up, of.scale))
    return dx


def constant_of(of: BatchMap) -> Tensor:
    """Return the constant that the gradient of a map adds to every row."""
    constant = torch.zeros_like(of.slope) if of.mean is None else of.slope * of.mean
    return constant if of.offset is None else constant - of.offset


def gradient(dy: Tensor, rows: Tensor, scale: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """Return ``dy scale + rows slope + shift``."""
    if dy.dtype == rows.dtype == torch.float32:
        return torch.addcmul(shift, rows, slope).addcmul_(dy, scale)
    dx, work, wide = torch.empty_like(rows), scratch(rows), scratch(rows)
    for upstream, block, out in blocks(dy, rows, dx):
        size = len(block)
        torch.addcmul(shift, wide[:size].copy_(block), slope, out=work[:size])
        out.copy_(work[:size].addcmul_(wide[:size].copy_(upstream), scale))
    return dx
