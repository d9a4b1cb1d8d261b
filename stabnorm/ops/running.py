"""The ops that hold a norm's running statistics: everything that one batch changes, and the decision whether it may.

Each works on a handful of ``[C]`` vectors. They are registered with the dispatcher, so that in a compiled model each is
one opaque node whose Python runs at run time, where a recomputed forward can be recognised (see
`stabnorm.ops.moments`): it changes nothing and gets back what the first one got. Decisions are `torch.where` on the
device. A batch that is not accepted, because it holds something non-finite, no valid token or an outlier, changes
counters and no more.

`progress` is an int64 ``[3]``: batches accepted so far; from which number of `skips` on the bursts are counted that
have come since; and how many of the accepted ones came since the warm-up began. `gate` is a bool ``[2]``: was the batch
accepted, and is it past the warm-up.
"""

import torch
from torch import Tensor

from stabnorm.functional import geometric_mean, is_burst
from stabnorm.ops.dispatch import op
from stabnorm.ops.moments import is_recompute
from stabnorm.ops.registration import returns_nothing

REMEMBERED = 16  # forwards of one module between a forward and its recompute; beyond, the batch is its own statistic


def _gate_like(square: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(square), square.new_empty(2, dtype=torch.bool)


@op(
    mutates=("window", "running", "recent", "step", "skips", "progress"),
    fake=lambda square, *_: _gate_like(square),
)
def smooth_square_(
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
    """Unified Normalization's forward statistics (arXiv:2208.01313, eq. 8): what to divide by, squared, and the gate.

    Args:
        square: ``[C]``, the batch's second moment.
        count: valid rows of the batch.
        window: ``[M, C]``, the last M accepted second moments.
        running: ``[C]``, what eval divides by.
        recent: see `_recall`.
        step: counter of steps.
        skips: counter of batches that were not accepted.
        progress: see the module.
        warmup: steps with the batch's own statistic.
        patience: so many bursts in a row are a new regime, and the warm-up of the window starts again.
        momentum: weight of the new value in `running`.
        eps: the norm's.
        filtered: whether there is an outlier filter.
        counting: whether this forward counts as a step.
    """
    if is_recompute():
        return _recall(recent, square)
    past = (step >= warmup) & (progress[2] >= len(window))
    accepted, restart, after = _judge(square, count, window, skips, progress, past, patience, eps, filtered)
    smooth = past & accepted & ~restart
    divisor = torch.where(smooth, geometric_mean(after), square)
    # The first batch replaces what the buffer was born with.
    weight = torch.where(progress[0] == 0, 1.0, running.new_full((), momentum))
    _keep_(window, after, accepted)
    _keep_(running, torch.lerp(running, divisor.to(running.dtype), weight), accepted)
    gate = torch.stack([accepted, smooth])
    _remember_(recent, square, divisor, gate)
    _count_(step, skips, progress, accepted, restart, counting)
    return divisor, gate


@op(mutates=("window", "average", "filled"), fake=lambda gradient, *_: torch.empty_like(gradient))
def smooth_gradient_(
    gradient: Tensor, gate: Tensor, window: Tensor, average: Tensor, filled: Tensor, momentum: float
) -> Tensor:
    """Unified Normalization's backward statistic psi ``[C]`` (arXiv:2208.01313, eq. 11) from mean(dz z) ``[C]``.

    Args:
        gradient: mean(dz z) of the batch.
        gate: from the batch's forward.
        window: ``[M, C]``, the last M of them.
        average: ``[C]``, the running average of the window's mean.
        filled: how many were entered.
        momentum: weight of the new value in `average`.
    """
    accepted = gate[0] & torch.isfinite(gradient).all()
    smooth = accepted & gate[1]
    size = len(window)
    after = _entered(window, gradient, filled)
    mean = after.sum(0) / (filled + 1).clamp(max=size)  # empty slots hold 0
    new = torch.lerp(average, torch.where(smooth, mean, gradient).to(average.dtype), momentum)
    psi = torch.where(smooth, new, gradient)
    _keep_(window, after, accepted)
    _keep_(average, new, accepted)
    filled.add_(accepted)
    return psi


def _has_filter(mean: Tensor | None, square: Tensor, count: Tensor, *rest: Tensor | None) -> bool:
    return rest[2] is not None  # the window


@op(
    "square",
    unless=_has_filter,
    mutates=("running_mean", "running_var", "window", "step", "skips", "progress"),
    fake=returns_nothing,
)
def track_batch_(
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
    """BatchNorm's running statistics: the mean and the unbiased variance, or the mean square where there is no mean.

    Args:
        mean: ``[C]``, the batch's; None where the norm does not centre.
        square: ``[C]``, the batch's variance, or second moment.
        count: valid rows of the batch.
        running_mean: ``[C]``, what eval uses; None where the norm does not centre.
        running_var: ``[C]``, what eval uses.
        window: ``[M, C]``, the last M second moments about the running mean; None: no outlier filter.
        step: counter of steps.
        skips: counter of batches that were not accepted.
        progress: see the module.
        patience: see `smooth_square_`.
        momentum: weight of the new value; negative: all accepted batches weigh the same.
        eps: the norm's.
        counting: whether this forward counts as a step.
    """
    if is_recompute():
        return
    enough = count if mean is None else count - 1  # the variance of one row is not 0: there is none
    about = square if mean is None or running_mean is None else square + (mean - running_mean).square()
    if window is None:
        accepted, restart = _sound(about, enough), None
    else:
        past = progress[2] >= len(window)
        accepted, restart, after = _judge(about, enough, window, skips, progress, past, patience, eps, True)
        _keep_(window, after, accepted)
    if mean is not None and running_mean is not None:
        square = square * (count / (count - 1).clamp(min=1))
        _keep_(running_mean, _moved(running_mean, mean, momentum, progress), accepted)
    _keep_(running_var, _moved(running_var, square, momentum, progress), accepted)
    _count_(step, skips, progress, accepted, restart, counting)


@op(
    mutates=("running", "recent", "step", "skips", "progress"),
    fake=lambda square, *_: _gate_like(square),
)
def track_quadratic_(
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
    """PowerNorm's running quadratic mean (arXiv:2003.07845, algorithm 2): what to divide by, squared, and the gate.

    Args:
        square: ``[C]``, the batch's second moment.
        count: valid rows of the batch.
        running: ``[C]``, psi^2; a plain mean of the warm-up's batches, then a running average.
        recent: see `_recall`.
        step: counter of steps.
        skips: counter of batches that were not accepted.
        progress: see the module.
        warmup: steps with the batch's own statistic.
        alpha: share of the old value.
        counting: whether this forward counts as a step.
    """
    if is_recompute():
        return _recall(recent, square)
    accepted = _sound(square, count)
    past = step >= warmup
    divisor = torch.where(past, running, square)
    weight = torch.where(past, 1 - alpha, 1 / (progress[2] + 1).to(running.dtype))
    _keep_(running, torch.lerp(running, square.to(running.dtype), weight), accepted)
    gate = torch.stack([accepted, past])
    _remember_(recent, square, divisor, gate)
    _count_(step, skips, progress, accepted, None, counting)
    return divisor, gate


@op(mutates=("nu",), fake=lambda gradient, *_: torch.empty_like(gradient))
def quadratic_gradient_(gradient: Tensor, power: Tensor, gate: Tensor, nu: Tensor, alpha: float) -> Tensor:
    r"""PowerNorm's backward statistic ``[C]`` (arXiv:2003.07845, algorithm 2); while warming up the exact one.

    .. math:: \nu \leftarrow \nu (1 - (1 - \alpha) \Gamma) + (1 - \alpha) \Lambda

    with Lambda = mean(dz z) and Gamma = mean(z^2). A factor below -1, a batch of over ten times the running rms, would
    let nu grow without bound, and counts as -1.

    Args:
        gradient: Lambda, ``[C]``.
        power: Gamma, ``[C]``.
        gate: from the batch's forward.
        nu: the running statistic.
        alpha: share of the old value.
    """
    accepted = gate[0] & torch.isfinite(gradient).all()
    psi = torch.where(gate[1], nu, gradient)
    kept = (1 - (1 - alpha) * power).clamp(min=-1)
    _keep_(nu, nu * kept + (1 - alpha) * gradient, accepted)
    return psi


# --- what they share ---


def _sound(square: Tensor, count: Tensor) -> Tensor:
    """Whether a batch holds anything, and nothing non-finite."""
    return torch.isfinite(square).all() & (count > 0)


def _judge(
    square: Tensor,
    count: Tensor,
    window: Tensor,
    skips: Tensor,
    progress: Tensor,
    past: Tensor,
    patience: int,
    eps: float,
    filtered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the batch is accepted, whether the window starts again with it, and the window with it in."""
    sound = _sound(square, count)
    after = _entered(window, square, progress[2])
    if not filtered:
        return sound, torch.zeros_like(sound), after
    burst = past & is_burst(window, after, eps)
    progress[1].add_(~sound)  # it will be skipped, but patience counts bursts
    # A frozen window would refuse a permanent change of scale for ever.
    restart = sound & burst & (skips - progress[1] + 1 >= patience)
    accepted = sound & (~burst | restart)
    return accepted, restart, torch.where(restart, _entered(window, square, torch.zeros_like(progress[2])), after)


def _entered(window: Tensor, new: Tensor, filled: Tensor) -> Tensor:
    """``window [M, C]`` with ``new`` in the place of the oldest."""
    slots = torch.arange(len(window), device=window.device)
    return torch.where((slots == filled % len(window))[:, None], new.to(window.dtype), window)


def _keep_(state: Tensor, new: Tensor, accepted: Tensor) -> None:
    state.copy_(torch.where(accepted, new.to(state.dtype), state))


def _moved(running: Tensor, new: Tensor, momentum: float, progress: Tensor) -> Tensor:
    weight = 1 / (progress[0] + 1).to(running.dtype) if momentum < 0 else momentum
    return torch.lerp(running, new.to(running.dtype), weight)


def _count_(
    step: Tensor, skips: Tensor, progress: Tensor, accepted: Tensor, restart: Tensor | None, counting: bool
) -> None:
    if counting:
        step.add_(1)
    skips.add_(~accepted)
    total, _, filled = progress.unbind()
    if restart is not None:
        filled = torch.where(restart, 0, filled)
    _keep_(progress, torch.stack([total + 1, skips, filled + 1]), accepted)


def _remember_(recent: Tensor, square: Tensor, divisor: Tensor, gate: Tensor) -> None:
    """Put an accepted batch before the others; a refused one is told by its absence."""
    line = torch.cat([square.to(recent.dtype), divisor.to(recent.dtype), gate[1:].to(recent.dtype)])
    _keep_(recent, torch.cat([line[None], recent[:-1]]), gate[0])


def _recall(recent: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """What the first forward of this batch got.

    ``recent [K, 2 C + 1]`` holds the last accepted batches: second moment, divisor, past the warm-up. A recompute sees
    the same input, so the second moment tells which forward it repeats; in checkpointing they come in any order.
    """
    channels = len(square)
    squares, divisors = recent[:, :channels], recent[:, channels : 2 * channels]
    apart = (squares - square).abs()
    near = apart.amax(1) <= 1e-5 * square.abs().amax()
    # A channel far above the others may hardly change from batch to batch: of those near in scale, the nearest in all.
    tiny = torch.finfo(square.dtype).tiny
    nearest = torch.where(near, (apart / square.clamp(min=tiny)).sum(1), torch.inf).argmin()
    known = near.any()
    divisor = torch.where(known, divisors.index_select(0, nearest[None])[0].to(square.dtype), square)
    smooth = recent.index_select(0, nearest[None])[0, -1] > 0
    # Within the warm-up the divisor is the batch's own statistic, in full precision.
    return torch.where(smooth, divisor, square), torch.stack([known, known & smooth])
