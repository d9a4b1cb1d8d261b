"""The C++ backend of `running`, see `running.cpp`: one call instead of about 25 small operations."""

import torch
from torch import Tensor

from stabnorm.ops.cpp.library import call
from stabnorm.ops.running import (
    quadratic_gradient_,
    smooth_gradient_,
    smooth_square_,
    track_batch_,
    track_quadratic_,
)


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
    call(
        "track_batch", mean, square, count.float(), square.numel(), running_mean, running_var, window,
        0 if window is None else len(window), step, skips, progress, patience, momentum, eps, counting,
    )  # fmt: skip


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
    divisor, gate = torch.empty_like(square), square.new_empty(2, dtype=torch.bool)
    call(
        "track_quadratic", square, count.float(), square.numel(), running, recent, len(recent), step, skips, progress,
        warmup, alpha, counting, divisor, gate,
    )  # fmt: skip
    return divisor, gate


@quadratic_gradient_.backend("cpp")
def quadratic_gradient(gradient: Tensor, power: Tensor, gate: Tensor, nu: Tensor, alpha: float) -> Tensor:
    """See `ops.running.quadratic_gradient_`."""
    psi = torch.empty_like(gradient)
    call("quadratic_gradient", gradient, power, gate, gradient.numel(), nu, alpha, psi)
    return psi
