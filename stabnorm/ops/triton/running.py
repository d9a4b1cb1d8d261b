"""The Triton backend of `running.track_batch_` without a filter: one launch instead of about 25 small ones."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stabnorm.ops.moments import is_recompute
from stabnorm.ops.running import track_batch_

_BLOCK = 1024


@triton.jit
def _track(
    mean_ptr, square_ptr, count_ptr, running_mean_ptr, running_var_ptr, step_ptr, skips_ptr, progress_ptr,
    channels, momentum, CENTER: tl.constexpr, KEEPS_MEAN: tl.constexpr, AVERAGE: tl.constexpr, COUNTING: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the statistics in one program, because all channels must be checked before one of them may change."""
    count, total = tl.load(count_ptr), tl.load(progress_ptr)
    enough = count
    if CENTER:
        enough = count - 1
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        about = tl.load(square_ptr + c, mask=c < channels, other=0.0)
        if KEEPS_MEAN:
            apart = tl.load(mean_ptr + c, mask=c < channels, other=0.0)
            apart -= tl.load(running_mean_ptr + c, mask=c < channels, other=0.0)
            about += apart * apart
        bad += (1 - (tl.abs(about) < float("inf")).to(tl.int32)) + (enough + tl.zeros_like(about) <= 0).to(tl.int32)
    refused = tl.sum(bad, 0)
    tl.debug_barrier()  # all warps must have read counters and means before one of them writes
    weight = momentum
    if AVERAGE:
        weight = 1.0 / (total + 1).to(tl.float32)
    unbiased = 1.0
    if KEEPS_MEAN:
        unbiased = count / tl.maximum(count - 1, 1.0)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        take = (c < channels) & (refused + tl.zeros([BLOCK], tl.int32) == 0)
        new = tl.load(square_ptr + c, mask=take, other=0.0) * unbiased
        old = tl.load(running_var_ptr + c, mask=take, other=0.0)
        tl.store(running_var_ptr + c, old + weight * (new - old), mask=take)
        if KEEPS_MEAN:
            new = tl.load(mean_ptr + c, mask=take, other=0.0)
            old = tl.load(running_mean_ptr + c, mask=take, other=0.0)
            tl.store(running_mean_ptr + c, old + weight * (new - old), mask=take)
    skips = tl.load(skips_ptr) + tl.minimum(refused, 1)
    tl.store(skips_ptr, skips)
    if COUNTING:
        tl.store(step_ptr, tl.load(step_ptr) + 1)
    if refused == 0:
        tl.store(progress_ptr, total + 1)
        tl.store(progress_ptr + 1, skips)
        tl.store(progress_ptr + 2, tl.load(progress_ptr + 2) + 1)


@track_batch_.backend("triton", in_graphs=True)
def track(
    mean: Tensor | None,
    square: Tensor,
    count: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor,
    window: Tensor | None,
    step: Tensor,
    skips: Tensor,
    progress: Tensor,
    patience: int,
    momentum: float,
    eps: float,
    counting: bool,
) -> None:
    """See `ops.running.track_batch_`; the formula runs where there is a filter."""
    if window is not None:
        return track_batch_.formula(
            mean, square, count, running_mean, running_var, window, step, skips, progress, patience, momentum, eps,
            counting,
        )  # fmt: skip
    if is_recompute():
        return None
    _track[(1,)](
        square if mean is None else mean.contiguous(), square.contiguous(), count.to(torch.float32),
        running_var if running_mean is None else running_mean, running_var, step, skips, progress, square.numel(),
        momentum, CENTER=mean is not None, KEEPS_MEAN=mean is not None and running_mean is not None,
        AVERAGE=momentum < 0, COUNTING=counting, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return None
