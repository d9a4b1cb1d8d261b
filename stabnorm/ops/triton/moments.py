"""The Triton backend of `moments`: it adds the moments of a forward to a layer's accumulator.

This takes one read of the input, or two reads with statistics of tokens or of the normalised input. The mean and
variance of a token must be known before its first channel can be normalised. The second read follows at once, so an
activation that fits the cache is read from memory only once.

The accumulator of a layer is plain (``seen []``, ``channel [rows, C]``, ``token [rows]``) or has splits as its first
axis, see `stabnorm.ops.triton.accumulating`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stabnorm.functional import RawMoments, empty_moments, merge_moments_, share_below
from stabnorm.ops.moments import Request, add_moments_
from stabnorm.ops.triton.accumulating import add_rows
from stabnorm.ops.triton.accumulators import merge
from stabnorm.ops.triton.shared import as_bytes, columns, laid_out, rows_of_tile

_KINDS = {"layer": 0, "rms": 1}  # the kinds whose tokens the kernel normalises


@triton.jit
def _tokens(
    x_ptr, out_ptr, seen_ptr, before_ptr, rows, channels, row_stride, splits,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Compute mean (a value and its rounding error) and biased variance of every token, ``[R, 3]``.

    The first program also copies how many rows each split of the accumulator has, for `add_rows`.
    """
    if tl.program_id(0) == 0:
        s = tl.arange(0, SPLITS)
        tl.store(before_ptr + s, tl.load(seen_ptr + s, mask=s < splits, other=0), mask=s < splits)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mean = tl.zeros([ROWS], tl.float32)
    rest = tl.zeros([ROWS], tl.float32)
    m2 = tl.zeros([ROWS], tl.float32)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        mask = (r < rows)[:, None] & (c < channels)[None, :]
        x = tl.load(x_ptr + r[:, None] * row_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        size = tl.minimum(channels - start, CHANNELS).to(tl.float32)
        mean = tl.where(start == 0, tl.sum(x, 1) / size, mean)
        x = tl.where(mask, x - mean[:, None], 0.0)
        of_block = tl.sum(x, 1) / size
        x = tl.where(mask, x - of_block[:, None], 0.0)
        share = size / (start + size)
        apart = of_block - rest
        rest += apart * share
        m2 += tl.sum(x * x, 1) + apart * apart * (start * share)
    tl.store(out_ptr + 3 * r, mean, mask=r < rows)
    tl.store(out_ptr + 3 * r + 1, rest, mask=r < rows)
    tl.store(out_ptr + 3 * r + 2, m2 / channels, mask=r < rows)


@add_moments_.backend("triton", in_graphs=True)
def add_moments_of_rows_(rows: Tensor, valid: Tensor | None, into: RawMoments, request: Request) -> None:
    """See `ops.moments.add_moments_`."""
    with torch.cuda.device_of(rows):  # a kernel runs on the current device, whatever the device of its arguments
        _add_moments_(rows, valid, into, request)


def _add_moments_(rows: Tensor, valid: Tensor | None, into: RawMoments, request: Request) -> None:
    if into.seen.ndim == 0:
        parts = empty_moments(columns(rows.shape[1], rows.device).splits, rows.shape[1], rows.device)
        _add_moments_(rows, valid, parts, request)
        (one,) = zip(*merge(*(part[None] for part in parts)), strict=True)
        merge_moments_(into, RawMoments(*one))
        return
    rows = laid_out(rows)
    length, channels = rows.shape
    by_groups, variances = request.by_groups, request.variances
    given = request.kind not in _KINDS
    normalized = request.normalized and not (given and by_groups is None)
    per_token, before, after = rows, into.seen, torch.empty_like(into.seen)
    by_token = request.tokens or (normalized and not given)
    if by_token:
        per_token = rows.new_empty(length, 3, dtype=torch.float32)
        before, after = after, before
        tile = rows_of_tile(min(channels, 1024))
        _tokens[(triton.cdiv(length, tile.rows),)](
            rows, per_token, into.seen, before, length, channels, rows.stride(0), len(before), ROWS=tile.rows,
            CHANNELS=tile.channels, SPLITS=triton.next_power_of_2(len(before)), num_warps=tile.warps,
        )  # fmt: skip
    n = rows if by_groups is None else laid_out(by_groups)
    share = None if variances is None else share_below(variances.flatten(), 10 * request.eps, None)
    where = columns(channels, rows.device)
    add_rows[(where.blocks, len(into.seen))](
        rows, n, per_token, rows if share is None else share, as_bytes(valid, rows), before, after, into.channel,
        into.token, length, channels, rows.stride(0), n.stride(0), into.channel.stride(0), into.channel.stride(1),
        into.token.stride(0), request.eps,
        KIND=_KINDS.get(request.kind, 2), TOKENS=request.tokens, NORMALIZED=normalized, MASKED=valid is not None,
        SHARE=share is not None, ROWS=where.rows, CHANNELS=where.channels, AHEAD=max(1, where.ahead // 2),
    )  # fmt: skip
    if not by_token:
        into.seen.copy_(after)
