"""The ATen backend of `moments`: it uses ATen's vectorised primitives, block by block, in memory that is kept.

These figures were measured at 3152 x 192, float32, with two threads. var, std, aminmax and norm over dim 0 take ATen's
scalar path and cost 10 to 60 reads. A new 2 MB tensor costs more in page faults than a pass over it. These are fast:
sum and amax over dim 0, mean and vector_norm over dim -1, `batch_norm_update_stats` (column mean and variance in two
passes) and the column sums inside `native_batch_norm_backward`. They accumulate in float32 along the rows. So a block
is shifted by its own mean first, and is short enough for its sums to keep six digits. Blocks merge by Chan's rule.
"""

import functools
import threading

import torch
from torch import Tensor

from stabnorm.functional import RawMoments, merge_moments_, share_below
from stabnorm.functional.moments import (
    COV_XN,
    EPS_SHARE,
    MAX,
    MEAN_MAX,
    MEAN_MEAN,
    MEAN_MIN,
    MIN,
    RAW,
    REST_N,
    REST_X,
    SHIFT_N,
    SHIFT_X,
    STD_MAX,
    STD_MEAN,
    STD_MIN,
    TOKEN_ROWS,
    VAR_N,
    VAR_X,
)
from stabnorm.ops.moments import Request, add_moments_

BLOCK_ELEMENTS = 1 << 20
BLOCK_ROWS = 8192
_kept = threading.local()


@add_moments_.backend("aten", in_graphs=True)
def add_moments_of_rows_(rows: Tensor, valid: Tensor | None, into: RawMoments, request: Request) -> None:
    """See `ops.moments.add_moments_`."""
    by_groups, variances = request.by_groups, request.variances
    rows = rows if rows.dtype is torch.float32 else rows.float()
    if valid is not None:  # on a CPU, selecting does not sync, and is cheaper than masking every pass
        rows = rows[valid]
        by_groups = None if by_groups is None else by_groups[valid]
    length, channels = rows.shape
    if length == 0:
        return
    share = None if variances is None else share_below(variances.flatten(), 10 * request.eps, None)
    step = min(BLOCK_ROWS, max(1, BLOCK_ELEMENTS // channels))
    one = length <= step  # one block is not sliced: every operation costs time here
    blocks = (rows,) if one else rows.split(step)
    blocks_n = (by_groups,) * len(blocks) if one or by_groups is None else by_groups.split(step)
    alone = request.fresh and one
    for block, block_n in zip(blocks, blocks_n, strict=True):
        new = into if alone else _scratch_moments(channels)
        new.seen.fill_(len(block))
        _fill(new, block.contiguous(), None if block_n is None else block_n.contiguous(), request, share)
        if not alone:
            merge_moments_(into, new)


def _scratch_moments(channels: int) -> RawMoments:
    return RAW.one(channels, torch.device("cpu"))


def scratch(like: Tensor) -> Tensor:
    """Return memory of the shape of ``like`` that is kept between calls."""
    flat: Tensor | None = getattr(_kept, "scratch", None)
    if flat is None or flat.numel() < like.numel():
        with torch.inference_mode(False):
            flat = torch.empty(max(like.numel(), BLOCK_ELEMENTS), dtype=torch.float32, device="cpu")
        _kept.scratch = flat
    return flat[: like.numel()].view_as(like)


def _fill(out: RawMoments, x: Tensor, n: Tensor | None, request: Request, share: Tensor | None) -> None:
    """Write one block's moments into ``out``.

    Every pass and every operation costs time here, because the caches are cold between the calls of two layers.
    """
    normalized = request.normalized
    channel = out.channel.unbind()
    torch.amax(x, 0, out=channel[MAX])
    torch.amin(x, 0, out=channel[MIN])
    shift = torch.mean(x, 0, out=channel[SHIFT_X])  # of few rows it would be cheaper, but the sums lose a digit
    work = torch.sub(x, shift, out=scratch(x))
    _column_mean_var(work, out=(channel[REST_X], channel[VAR_X]))
    by_token = normalized and request.kind in ("layer", "rms")
    if request.tokens or by_token:
        _fill_tokens(out, work, shift, request, share, by_token)
    if by_token:
        n = work
    elif n is not None and normalized:
        n = n - torch.mean(n, 0, out=channel[SHIFT_N])
    if n is not None and normalized:
        _column_mean_var(n, out=(channel[REST_N], channel[VAR_N]))
        dot = _column_mean_dot(n, x, shift)
        torch.addcmul(dot, channel[REST_N], channel[REST_X], value=-1, out=channel[COV_XN])


def _fill_tokens(
    out: RawMoments, work: Tensor, shift: Tensor, request: Request, share: Tensor | None, by_token: bool
) -> None:
    """Write the per-token statistics from ``work = x - shift``; with `by_token` leave the normalised input in work."""
    kind, eps, token = request.kind, request.eps, out.token
    summary = work.new_empty(2, len(work))  # standard deviation and mean of every token
    std, mean = summary
    # Means are computed around a common origin: a mean of 1e4 in float32 has an error as large as a token's deviations.
    origin = shift.mean()
    offsets = shift - origin
    offsets -= offsets.mean()
    torch.mean(work, -1, out=mean)
    work.sub_(mean[:, None]).add_(offsets)
    torch.linalg.vector_norm(work, 2, -1, out=std).mul_(work.shape[1] ** -0.5)
    if kind == "layer":
        divided_by = torch.addcmul(_constant(eps), std, std)
        torch.mean(divided_by < 11 * eps, 0, dtype=torch.float32, out=token[EPS_SHARE])
        if by_token:
            scale = divided_by.rsqrt_()
            _normalize(out, work, scale, offsets)
    elif kind == "rms":
        whole_mean = mean.double() + origin
        divided_by = torch.addcmul(whole_mean.square(), std.double(), std)
        torch.mean(divided_by < 10 * eps, 0, dtype=torch.float32, out=token[EPS_SHARE])
        if by_token:
            # For a large origin, x / rms is a constant plus a small rest. The constant goes into the shift.
            scale = torch.rsqrt(divided_by + eps)
            constant = origin * scale.mean()
            _normalize(out, work, scale.float(), offsets)
            work.add_((whole_mean * scale - constant).float()[:, None])
            out.channel[SHIFT_N] += constant
    elif share is not None:
        token[EPS_SHARE] = share
    torch.mean(summary, 1, out=token[STD_MEAN : MEAN_MEAN + 1])
    torch.amin(summary, 1, out=token[STD_MIN:STD_MAX])
    torch.amax(summary, 1, out=token[STD_MAX:])
    token.addcmul_(_ROWS_OF_MEANS, origin)


def _normalize(out: RawMoments, work: Tensor, scale: Tensor, offsets: Tensor) -> None:
    """Scale every token, and move what is the same in all tokens into the shift: a channel far from the others."""
    shift = torch.mul(offsets, scale.mean(), out=out.channel[SHIFT_N])
    work.mul_(scale[:, None]).sub_(shift)


_ROWS_OF_MEANS = torch.zeros(TOKEN_ROWS, dtype=torch.float32, device="cpu")
_ROWS_OF_MEANS[[MEAN_MEAN, MEAN_MIN, MEAN_MAX]] = 1


@functools.cache
def _constant(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device="cpu")


@functools.cache
def _full(channels: int, value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((channels,), value, dtype=torch.float32, device="cpu")


def _column_mean_var(x: Tensor, out: tuple[Tensor, Tensor]) -> None:
    torch.ops.aten.batch_norm_update_stats.out(x, None, None, 0.0, out0=out[0], out1=out[1])


def _column_mean_dot(a: Tensor, b: Tensor, shift: Tensor) -> Tensor:
    """Return the mean over rows of ``a * (b - shift)``, as the weight gradient of a batch norm with this mean."""
    rows, channels = a.shape
    dot: Tensor = torch.ops.aten.native_batch_norm_backward(
        a, b, None, None, None, shift, _full(channels, 1 / rows), True, 0.0, [False, True, True]
    )[1]
    return dot
