"""The C++ backend of `running`, see `running.cpp`: one call instead of about 25 small operations."""

import torch
from torch import Tensor

from stabnorm.ops.cpp.library import call
from stabnorm.ops.moments import is_recompute
from stabnorm.ops.running import (
    fits_kernels,
    quadratic_gradient_,
    smooth_gradient_,
    smooth_square_,
    track_batch_,
    track_quadratic_,
)

LONGEST = 8  # a window; a product of more float32 values could leave the range of float64


def _is_long(window: Tensor | None) -> bool:
    return window is not None and len(window) > LONGEST


@track_batch_.backend("cpp")
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
    if not fits_kernels(mean, square, running_mean, running_var, window) or _is_long(window):
        return track_batch_.formula(
            mean, square, count, running_mean, running_var, window, step, skips, progress, patience, momentum, eps,
            counting,
        )  # fmt: skip
    if not is_recompute():
        call(
            "track_batch", mean, square, count.float(), square.numel(), running_mean, running_var, window,
            0 if window is None else len(window), step, skips, progress, patience, momentum, eps, counting,
        )  # fmt: skip
    return None


@smooth_square_.backend("cpp")
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
    if is_recompute() or not fits_kernels(square, running, recent, window) or _is_long(window):
        return smooth_square_.formula(
            square, count, window, running, recent, step, skips, progress, warmup, patience, momentum, eps, filtered,
            counting,
        )  # fmt: skip
    divisor, gate = torch.empty_like(square), square.new_empty(2, dtype=torch.bool)
    call(
        "smooth_square", square, count.float(), square.numel(), window, len(window), running, recent, len(recent), step,
        skips, progress, warmup, patience, momentum, eps, filtered, counting, divisor, gate,
    )  # fmt: skip
    return divisor, gate


@smooth_gradient_.backend("cpp")
def smooth_gradient(
    gradient: Tensor, gate: Tensor, window: Tensor, average: Tensor, filled: Tensor, momentum: float
) -> Tensor:
    """See `ops.running.smooth_gradient_`."""
    if not fits_kernels(gradient, average, window) or not gate.is_contiguous():
        return smooth_gradient_.formula(gradient, gate, window, average, filled, momentum)
    psi = torch.empty_like(gradient)
    call("smooth_gradient", gradient, gate, gradient.numel(), window, len(window), average, filled, momentum, psi)
    return psi


@track_quadratic_.backend("cpp")
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
    if is_recompute() or not fits_kernels(square, running, recent):
        return track_quadratic_.formula(square, count, running, recent, step, skips, progress, warmup, alpha, counting)
    divisor, gate = torch.empty_like(square), square.new_empty(2, dtype=torch.bool)
    call(
        "track_quadratic", square, count.float(), square.numel(), running, recent, len(recent), step, skips, progress,
        warmup, alpha, counting, divisor, gate,
    )  # fmt: skip
    return divisor, gate


@quadratic_gradient_.backend("cpp")
def quadratic_gradient(gradient: Tensor, power: Tensor, gate: Tensor, nu: Tensor, alpha: float) -> Tensor:
    """See `ops.running.quadratic_gradient_`."""
    if not fits_kernels(gradient, power, nu) or not gate.is_contiguous():
        return quadratic_gradient_.formula(gradient, power, gate, nu, alpha)
    psi = torch.empty_like(gradient)
    call("quadratic_gradient", gradient, power, gate, gradient.numel(), nu, alpha, psi)
    return psi
