"""The Triton backend of `running`: one launch instead of 25 to 60 small ones.

One program does all, because a decision about a batch needs all channels before one of them may change. Its warps read
counters and old values before a barrier, and write behind it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stabnorm.ops.running import (
    quadratic_gradient_,
    smooth_gradient_,
    smooth_square_,
    track_batch_,
    track_quadratic_,
)

_BLOCK = 1024
_TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


# --- parts of the kernels ---


@triton.jit
def _geometric_mean(window_ptr, new, slot, least, c, inside, channels, WINDOW: tl.constexpr):
    """Average a window ``[WINDOW, channels]`` in which `new` stands at `slot`; no value counts as less than `least`."""
    logs = tl.zeros_like(new)
    for m in range(WINDOW):
        value = tl.load(window_ptr + m * channels + c, mask=inside, other=1.0)
        value = tl.where(slot + tl.zeros_like(c) == m, new, value)
        logs += tl.log(tl.maximum(value, least))
    return tl.exp(logs / WINDOW)


@triton.jit
def _burst_terms(window_ptr, new, slot, eps, c, inside, channels, WINDOW: tl.constexpr):
    """The two terms of `functional.is_burst` for each channel."""
    least = tl.maximum(eps, _TINY)
    before = _geometric_mean(window_ptr, new, -1, least, c, inside, channels, WINDOW)
    after = _geometric_mean(window_ptr, new, slot, least, c, inside, channels, WINDOW)
    total, roots, squares = tl.zeros_like(new), tl.zeros_like(new), tl.zeros_like(new)
    for m in range(WINDOW):
        old = tl.maximum(tl.load(window_ptr + m * channels + c, mask=inside, other=1.0), eps)
        total += tl.where(slot + tl.zeros_like(c) == m, tl.maximum(new, eps), old)
        roots += tl.sqrt(old)
    for m in range(WINDOW):
        old = tl.maximum(tl.load(window_ptr + m * channels + c, mask=inside, other=1.0), eps)
        apart = tl.sqrt(old) - roots / WINDOW
        squares += apart * apart
    gap, spread = (total / WINDOW - after) / before, squares / WINDOW / before
    return tl.where(inside, gap, 0.0), tl.where(inside, spread, 0.0)


@triton.jit
def _judge(gaps, spreads, sound, past, skips, spoilt, patience, channels, WINDOW: tl.constexpr):
    """Return whether the batch is accepted, and whether the window starts again with it, as 0 or 1."""
    burst = sound * past * (tl.sum(gaps, 0) / channels > WINDOW * (tl.sum(spreads, 0) / channels) + 1e-5).to(tl.int32)
    restart = burst * (skips - spoilt + 1 >= patience).to(tl.int32)
    return sound * tl.maximum(1 - burst, restart), restart


@triton.jit
def _unsound(value, enough, inside):
    """Count values that are not finite, and the batch if it has too few rows."""
    bad = (1 - (tl.abs(value) < float("inf")).to(tl.int32)) + (enough + tl.zeros_like(value) <= 0).to(tl.int32)
    return tl.where(inside, bad, 0)


@triton.jit
def _where(inside, flag):
    """The channels of this block, if a flag of 0 or 1 is set."""
    return inside & (flag + tl.zeros_like(inside.to(tl.int32)) > 0)


@triton.jit
def _moved(old, to, weight):
    """The next value of a running average; a weight of 1 gives `to` exactly."""
    return tl.where(weight + tl.zeros_like(to) == 1.0, to, old + weight * (to - old))


@triton.jit
def _count(
    step_ptr, skips_ptr, progress_ptr, step, skips, total, spoilt, filled, accepted, restart, COUNTING: tl.constexpr
):
    """Write the counters; the values were read before any was written."""
    skips += 1 - accepted
    tl.store(skips_ptr, skips)
    if COUNTING:
        tl.store(step_ptr, step + 1)
    if accepted != 0:
        tl.store(progress_ptr, total + 1)
        tl.store(progress_ptr + 1, skips)
        tl.store(progress_ptr + 2, filled * (1 - restart) + 1)
    else:
        tl.store(progress_ptr + 1, spoilt)


@triton.jit
def _remember(recent_ptr, square_ptr, divisor_ptr, smooth, channels, REMEMBERED: tl.constexpr, BLOCK: tl.constexpr):
    """Store an accepted batch before the others. All threads have written the divisors before."""
    size = 2 * channels + 1
    for start in range(0, size, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < size
        for k in range(REMEMBERED - 1):
            older = recent_ptr + (REMEMBERED - 2 - k) * size + c
            tl.store(older + size, tl.load(older, mask=inside, other=0.0), mask=inside)
        square = tl.load(square_ptr + c, mask=c < channels, other=0.0)
        divisor = tl.load(divisor_ptr + c - channels, mask=(c >= channels) & (c < 2 * channels), other=0.0)
        last = tl.where(c == 2 * channels, smooth + tl.zeros_like(square), 0.0)
        tl.store(recent_ptr + c, square + divisor + last, mask=inside)


# --- the kernels ---


@triton.jit
def _track(
    mean_ptr, square_ptr, count_ptr, running_mean_ptr, running_var_ptr, window_ptr, step_ptr, skips_ptr, progress_ptr,
    channels, patience, momentum, eps, CENTER: tl.constexpr, KEEPS_MEAN: tl.constexpr, AVERAGE: tl.constexpr,
    COUNTING: tl.constexpr, FILTERED: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count, step, skips = tl.load(count_ptr), tl.load(step_ptr), tl.load(skips_ptr)
    total, spoilt, filled = tl.load(progress_ptr), tl.load(progress_ptr + 1), tl.load(progress_ptr + 2)
    slot, enough = filled % WINDOW, count
    if CENTER:
        enough = count - 1
    bad, gaps, spreads = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < channels
        about = tl.load(square_ptr + c, mask=inside, other=0.0)
        if KEEPS_MEAN:
            apart = tl.load(mean_ptr + c, mask=inside, other=0.0)
            apart -= tl.load(running_mean_ptr + c, mask=inside, other=0.0)
            about += apart * apart
        bad += _unsound(about, enough, inside)
        if FILTERED:
            gap, spread = _burst_terms(window_ptr, about, slot, eps, c, inside, channels, WINDOW)
            gaps, spreads = gaps + gap, spreads + spread
    sound = (tl.sum(bad, 0) == 0).to(tl.int32)
    accepted, restart = sound, sound * 0
    if FILTERED:
        spoilt += 1 - sound  # such a batch is skipped, too, but patience counts bursts only
        past = (filled >= WINDOW).to(tl.int32)
        accepted, restart = _judge(gaps, spreads, sound, past, skips, spoilt, patience, channels, WINDOW)
    tl.debug_barrier()
    weight = momentum
    if AVERAGE:
        weight = 1.0 / (total + 1).to(tl.float32)
    unbiased = 1.0
    if KEEPS_MEAN:
        unbiased = count / tl.maximum(count - 1, 1.0)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        take = _where(c < channels, accepted)
        square = tl.load(square_ptr + c, mask=take, other=0.0)
        about = square
        if KEEPS_MEAN:
            mean = tl.load(mean_ptr + c, mask=take, other=0.0)
            old = tl.load(running_mean_ptr + c, mask=take, other=0.0)
            about += (mean - old) * (mean - old)
            tl.store(running_mean_ptr + c, _moved(old, mean, weight), mask=take)
        if FILTERED:
            tl.store(window_ptr + slot * (1 - restart) * channels + c, about, mask=take)
        old = tl.load(running_var_ptr + c, mask=take, other=0.0)
        tl.store(running_var_ptr + c, _moved(old, square * unbiased, weight), mask=take)
    _count(step_ptr, skips_ptr, progress_ptr, step, skips, total, spoilt, filled, accepted, restart, COUNTING)


@triton.jit
def _smooth_square(
    square_ptr, count_ptr, window_ptr, running_ptr, recent_ptr, step_ptr, skips_ptr, progress_ptr, divisor_ptr,
    gate_ptr, channels, warmup, patience, momentum, eps, FILTERED: tl.constexpr, COUNTING: tl.constexpr,
    WINDOW: tl.constexpr, REMEMBERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count, step, skips = tl.load(count_ptr), tl.load(step_ptr), tl.load(skips_ptr)
    total, spoilt, filled = tl.load(progress_ptr), tl.load(progress_ptr + 1), tl.load(progress_ptr + 2)
    slot, past = filled % WINDOW, (step >= warmup).to(tl.int32) * (filled >= WINDOW).to(tl.int32)
    bad, gaps, spreads = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < channels
        square = tl.load(square_ptr + c, mask=inside, other=0.0)
        bad += _unsound(square, count, inside)
        if FILTERED:
            gap, spread = _burst_terms(window_ptr, square, slot, eps, c, inside, channels, WINDOW)
            gaps, spreads = gaps + gap, spreads + spread
    sound = (tl.sum(bad, 0) == 0).to(tl.int32)
    accepted, restart = sound, sound * 0
    if FILTERED:
        spoilt += 1 - sound
        accepted, restart = _judge(gaps, spreads, sound, past, skips, spoilt, patience, channels, WINDOW)
    smooth = past * accepted * (1 - restart)
    tl.debug_barrier()
    weight = tl.where(total == 0, 1.0, momentum)  # the first batch replaces the initial value of the buffer
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < channels
        take = _where(inside, accepted)
        square = tl.load(square_ptr + c, mask=inside, other=0.0)
        mean = _geometric_mean(window_ptr, square, slot, _TINY, c, inside, channels, WINDOW)
        divisor = tl.where(_where(inside, smooth), mean, square)
        tl.store(divisor_ptr + c, divisor, mask=inside)
        tl.store(window_ptr + slot * (1 - restart) * channels + c, square, mask=take)
        old = tl.load(running_ptr + c, mask=take, other=0.0)
        tl.store(running_ptr + c, _moved(old, divisor, weight), mask=take)
    tl.store(gate_ptr, accepted.to(tl.uint8))
    tl.store(gate_ptr + 1, smooth.to(tl.uint8))
    tl.debug_barrier()
    if accepted != 0:
        _remember(recent_ptr, square_ptr, divisor_ptr, smooth.to(tl.float32), channels, REMEMBERED, BLOCK)
    _count(step_ptr, skips_ptr, progress_ptr, step, skips, total, spoilt, filled, accepted, restart, COUNTING)


@triton.jit
def _smooth_gradient(
    gradient_ptr, gate_ptr, window_ptr, average_ptr, filled_ptr, psi_ptr, channels, momentum, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    filled = tl.load(filled_ptr)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        bad += _unsound(tl.load(gradient_ptr + c, mask=c < channels, other=0.0), 1.0, c < channels)
    accepted = (tl.sum(bad, 0) == 0).to(tl.int32) * tl.load(gate_ptr).to(tl.int32)
    smooth = accepted * tl.load(gate_ptr + 1).to(tl.int32)
    tl.debug_barrier()
    slot, size = filled % WINDOW, tl.minimum(filled + 1, WINDOW)  # empty slots hold 0
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < channels
        take, is_smooth = _where(inside, accepted), _where(inside, smooth)
        new = tl.load(gradient_ptr + c, mask=inside, other=0.0)
        total = tl.zeros_like(new)
        for m in range(WINDOW):
            old = tl.load(window_ptr + m * channels + c, mask=inside, other=0.0)
            total += tl.where(slot + tl.zeros_like(c) == m, new, old)
        old = tl.load(average_ptr + c, mask=inside, other=0.0)
        moved = old + momentum * (tl.where(is_smooth, total / size.to(tl.float32), new) - old)
        tl.store(psi_ptr + c, tl.where(is_smooth, moved, new), mask=inside)
        tl.store(average_ptr + c, moved, mask=take)
        tl.store(window_ptr + slot * channels + c, new, mask=take)
    tl.store(filled_ptr, filled + accepted)


@triton.jit
def _track_quadratic(
    square_ptr, count_ptr, running_ptr, recent_ptr, step_ptr, skips_ptr, progress_ptr, divisor_ptr, gate_ptr, channels,
    warmup, alpha, COUNTING: tl.constexpr, REMEMBERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count, step, skips = tl.load(count_ptr), tl.load(step_ptr), tl.load(skips_ptr)
    total, spoilt, filled = tl.load(progress_ptr), tl.load(progress_ptr + 1), tl.load(progress_ptr + 2)
    past = (step >= warmup).to(tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        bad += _unsound(tl.load(square_ptr + c, mask=c < channels, other=0.0), count, c < channels)
    accepted = (tl.sum(bad, 0) == 0).to(tl.int32)
    tl.debug_barrier()
    weight = tl.where(past != 0, 1.0 - alpha, 1.0 / (filled + 1).to(tl.float32))
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < channels
        square = tl.load(square_ptr + c, mask=inside, other=0.0)
        old = tl.load(running_ptr + c, mask=inside, other=0.0)
        tl.store(divisor_ptr + c, tl.where(_where(inside, past), old, square), mask=inside)
        tl.store(running_ptr + c, _moved(old, square, weight), mask=_where(inside, accepted))
    tl.store(gate_ptr, accepted.to(tl.uint8))
    tl.store(gate_ptr + 1, past.to(tl.uint8))
    tl.debug_barrier()
    if accepted != 0:
        _remember(recent_ptr, square_ptr, divisor_ptr, past.to(tl.float32), channels, REMEMBERED, BLOCK)
    _count(step_ptr, skips_ptr, progress_ptr, step, skips, total, spoilt, filled, accepted, accepted * 0, COUNTING)


@triton.jit
def _quadratic_gradient(gradient_ptr, power_ptr, gate_ptr, nu_ptr, psi_ptr, channels, alpha, BLOCK: tl.constexpr):
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        bad += _unsound(tl.load(gradient_ptr + c, mask=c < channels, other=0.0), 1.0, c < channels)
    accepted = (tl.sum(bad, 0) == 0).to(tl.int32) * tl.load(gate_ptr).to(tl.int32)
    past = tl.load(gate_ptr + 1).to(tl.int32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < channels
        gradient = tl.load(gradient_ptr + c, mask=inside, other=0.0)
        nu = tl.load(nu_ptr + c, mask=inside, other=0.0)
        kept = tl.maximum(1 - (1 - alpha) * tl.load(power_ptr + c, mask=inside, other=0.0), -1.0)
        tl.store(psi_ptr + c, tl.where(_where(inside, past), nu, gradient), mask=inside)
        tl.store(nu_ptr + c, nu * kept + (1 - alpha) * gradient, mask=_where(inside, accepted))


# --- the backends ---


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
    """See `ops.running.track_batch_`."""
    _track[(1,)](
        square if mean is None else mean, square, count.to(torch.float32),
        running_var if running_mean is None else running_mean, running_var, square if window is None else window, step,
        skips, progress, square.numel(), patience, momentum, eps, CENTER=mean is not None,
        KEEPS_MEAN=mean is not None and running_mean is not None, AVERAGE=momentum < 0, COUNTING=counting,
        FILTERED=window is not None, WINDOW=1 if window is None else len(window), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


@smooth_square_.backend("triton", in_graphs=True)
def smooth(
    square: Tensor,
    count: Tensor,
    window: Tensor,
    running: Tensor,
    recent: Tensor,
    step: Tensor,
    skips: Tensor,
    progress: Tensor,
    warmup: int,
    patience: int,
    momentum: float,
    eps: float,
    filtered: bool,
    counting: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.running.smooth_square_`."""
    divisor, gate = torch.empty_like(square), _new_gate(square)
    _smooth_square[(1,)](
        square, count.to(torch.float32), window, running, recent, step, skips, progress, divisor, gate, square.numel(),
        warmup, patience, momentum, eps, FILTERED=filtered, COUNTING=counting, WINDOW=len(window),
        REMEMBERED=len(recent), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return divisor, gate.view(torch.bool)


@smooth_gradient_.backend("triton", in_graphs=True)
def smooth_gradient(
    gradient: Tensor, gate: Tensor, window: Tensor, average: Tensor, filled: Tensor, momentum: float
) -> Tensor:
    """See `ops.running.smooth_gradient_`."""
    psi = torch.empty_like(gradient)
    _smooth_gradient[(1,)](
        gradient, gate.view(torch.uint8), window, average, filled, psi, gradient.numel(), momentum,
        WINDOW=len(window), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return psi


@track_quadratic_.backend("triton", in_graphs=True)
def track_mean_square(
    square: Tensor,
    count: Tensor,
    running: Tensor,
    recent: Tensor,
    step: Tensor,
    skips: Tensor,
    progress: Tensor,
    warmup: int,
    alpha: float,
    counting: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.running.track_quadratic_`."""
    divisor, gate = torch.empty_like(square), _new_gate(square)
    _track_quadratic[(1,)](
        square, count.to(torch.float32), running, recent, step, skips, progress, divisor, gate, square.numel(), warmup,
        alpha, COUNTING=counting, REMEMBERED=len(recent), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return divisor, gate.view(torch.bool)


@quadratic_gradient_.backend("triton", in_graphs=True)
def quadratic_gradient(gradient: Tensor, power: Tensor, gate: Tensor, nu: Tensor, alpha: float) -> Tensor:
    """See `ops.running.quadratic_gradient_`."""
    psi = torch.empty_like(gradient)
    _quadratic_gradient[(1,)](
        gradient, power, gate.view(torch.uint8), nu, psi, gradient.numel(), alpha,
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return psi


def _new_gate(square: Tensor) -> Tensor:
    return torch.empty(2, dtype=torch.uint8, device=square.device)
