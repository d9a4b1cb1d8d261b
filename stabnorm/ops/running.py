"""The ops that update a norm's running statistics, and decide whether a batch may change them.

Each op works on a few ``[C]`` vectors. The ops are registered with the dispatcher, so in a compiled model each one is
one opaque node whose Python code runs at run time, where a recomputed forward can be recognised (see
`stabnorm.ops.moments`). Such a forward changes nothing and gets the same result as the first one. Decisions are
`torch.where` on the device. A batch is rejected if it has a value that is not finite, no valid token, or if it is an
outlier. A rejected batch only changes counters.

`progress` is an int64 ``[3]``: the number of accepted batches; the value of `skips` from which bursts are counted; and
the number of accepted batches since the warm-up began. `gate` is a bool ``[2]``: whether the batch was accepted, and
whether the warm-up is over.
"""

import torch
from torch import Tensor

from stabnorm._registration import returns_nothing
from stabnorm.functional import geometric_mean, is_burst
from stabnorm.ops.dispatch import op
from stabnorm.ops.moments import is_recompute

REMEMBERED = 16  # forwards that are remembered for a recompute; an older one is recomputed with its own statistics


def _not_in_place(*args: object) -> bool:
    """Whether a kernel cannot read and write these vectors and counters where they are."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return not all(t.is_contiguous() and t.dtype in (torch.float32, torch.int64, torch.bool) for t in tensors)


def _recalled_or_not_in_place(*args: object) -> bool:
    """The same in a forward; a recomputed one changes nothing, and the formula recalls what the first one returned."""
    return is_recompute() or _not_in_place(*args)


def _gate_like(square: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(square), square.new_empty(2, dtype=torch.bool)


@op(
    "square",
    unless=_recalled_or_not_in_place,
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
    """Update Unified Normalization's forward statistics (arXiv:2208.01313, eq. 8); return squared divisor and gate.

    Args:
        square: ``[C]``, second moment of the batch.
        count: number of valid rows in the batch.
        window: ``[M, C]``, the last M accepted second moments.
        running: ``[C]``, squared divisor of eval mode.
        recent: see `_recall`.
        step: counter of steps.
        skips: counter of rejected batches.
        progress: see the module.
        warmup: number of steps with the statistics of the batch.
        patience: number of bursts in a row after which they count as normal, and the window starts again.
        momentum: weight of the new value in `running`.
        eps: eps of the norm.
        filtered: whether there is an outlier filter.
        counting: whether this forward counts as a step.
    """
    if is_recompute():
        return _recall(recent, square)
    past = (step >= warmup) & (progress[2] >= len(window))
    accepted, restart, after = _judge(square, count, window, skips, progress, past, patience, eps, filtered)
    smooth = past & accepted & ~restart
    divisor = torch.where(smooth, geometric_mean(after), square)
    # The first batch replaces the initial value of the buffer.
    weight = torch.where(progress[0] == 0, 1.0, running.new_full((), momentum))
    _keep_(window, after, accepted)
    _keep_(running, torch.lerp(running, divisor.to(running.dtype), weight), accepted)
    gate = torch.stack([accepted, smooth])
    _remember_(recent, square, divisor, gate)
    _count_(step, skips, progress, accepted, restart, counting)
    return divisor, gate


@op(
    "gradient",
    unless=_not_in_place,
    mutates=("window", "average", "filled"),
    fake=lambda gradient, *_: torch.empty_like(gradient),
)
def smooth_gradient_(
    gradient: Tensor, gate: Tensor, window: Tensor, average: Tensor, filled: Tensor, momentum: float
) -> Tensor:
    """Update Unified Normalization's backward statistic (arXiv:2208.01313, eq. 11); return psi ``[C]``.

    Args:
        gradient: ``[C]``, mean(dz z) of the batch.
        gate: from the forward of the batch.
        window: ``[M, C]``, the last M values of `gradient`.
        average: ``[C]``, running average of the window's mean.
        filled: number of values that were added to the window.
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


@op(
    "square",
    unless=_recalled_or_not_in_place,
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
    """Update BatchNorm's running statistics: mean and unbiased variance, or the mean square if there is no mean.

    Args:
        mean: ``[C]``, mean of the batch; None if the norm is not centred.
        square: ``[C]``, variance of the batch, or its second moment if the norm is not centred.
        count: number of valid rows in the batch.
        running_mean: ``[C]``, mean in eval mode; None if the norm is not centred.
        running_var: ``[C]``, variance or second moment in eval mode.
        window: ``[M, C]``, the last M second moments around the running mean; None if there is no outlier filter.
        step: counter of steps.
        skips: counter of rejected batches.
        progress: see the module.
        patience: see `smooth_square_`.
        momentum: weight of the new value; if negative, all accepted batches have the same weight.
        eps: eps of the norm.
        counting: whether this forward counts as a step.
    """
    if is_recompute():
        return
    enough = count if mean is None else count - 1  # one row has no variance
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
    "square",
    unless=_recalled_or_not_in_place,
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
    """Update PowerNorm's running quadratic mean (arXiv:2003.07845, algorithm 2); return squared divisor and gate.

    Args:
        square: ``[C]``, second moment of the batch.
        count: number of valid rows in the batch.
        running: ``[C]``, psi^2: in the warm-up the plain mean of all batches, then a running average.
        recent: see `_recall`.
        step: counter of steps.
        skips: counter of rejected batches.
        progress: see the module.
        warmup: number of steps with the statistics of the batch.
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


@op(
    "gradient",
    unless=_not_in_place,
    mutates=("nu",),
    fake=lambda gradient, *_: torch.empty_like(gradient),
)
def quadratic_gradient_(gradient: Tensor, power: Tensor, gate: Tensor, nu: Tensor, alpha: float) -> Tensor:
    r"""Update PowerNorm's backward statistic (arXiv:2003.07845, algorithm 2); return psi ``[C]``, exact in the warm-up.

    .. math:: \nu \leftarrow \nu (1 - (1 - \alpha) \Gamma) + (1 - \alpha) \Lambda

    with Lambda = mean(dz z) and Gamma = mean(z^2). If the rms of a batch is several times the running one, the factor
    of nu would be below -1 and nu would grow without bound. Such a factor is replaced by -1.

    Args:
        gradient: Lambda, ``[C]``.
        power: Gamma, ``[C]``.
        gate: from the forward of the batch.
        nu: the running statistic.
        alpha: share of the old value.
    """
    accepted = gate[0] & torch.isfinite(gradient).all()
    psi = torch.where(gate[1], nu, gradient)
    kept = (1 - (1 - alpha) * power).clamp(min=-1)
    _keep_(nu, nu * kept + (1 - alpha) * gradient, accepted)
    return psi


# --- parts of these ops ---


def _sound(square: Tensor, count: Tensor) -> Tensor:
    """Whether a batch has a valid row and only finite statistics."""
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
    """Return whether the batch is accepted, whether the window starts again with it, and the window with the batch."""
    sound = _sound(square, count)
    after = _entered(window, square, progress[2])
    if not filtered:
        return sound, torch.zeros_like(sound), after
    burst = past & is_burst(window, after, eps)
    progress[1].add_(~sound)  # such a batch is skipped, too, but patience counts bursts only
    # Without a restart, a window that no longer changes would reject a permanent change of scale for ever.
    restart = sound & burst & (skips - progress[1] + 1 >= patience)
    accepted = sound & (~burst | restart)
    return accepted, restart, torch.where(restart, _entered(window, square, torch.zeros_like(progress[2])), after)


def _entered(window: Tensor, new: Tensor, filled: Tensor) -> Tensor:
    """Return ``window [M, C]`` with ``new`` in the place of the oldest value."""
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
    """Store an accepted batch before the others; rejected batches are not stored."""
    line = torch.cat([square.to(recent.dtype), divisor.to(recent.dtype), gate[1:].to(recent.dtype)])
    _keep_(recent, torch.cat([line[None], recent[:-1]]), gate[0])


def _recall(recent: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of the first forward of this batch, for a recomputed forward.

    ``recent [K, 2 C + 1]`` holds the last accepted batches: second moment, divisor, and whether the warm-up was over. A
    recompute has the same input, so its second moment tells which forward it repeats; recomputes come in any order.
    """
    channels = len(square)
    squares, divisors = recent[:, :channels], recent[:, channels : 2 * channels]
    apart = (squares - square).abs()
    near = apart.amax(1) <= 1e-5 * square.abs().amax()
    # One very large channel may hardly change between batches. So compare the scale first, then all channels.
    tiny = torch.finfo(square.dtype).tiny
    nearest = torch.where(near, (apart / square.clamp(min=tiny)).sum(1), torch.inf).argmin()
    known = near.any()
    divisor = torch.where(known, divisors.index_select(0, nearest[None])[0].to(square.dtype), square)
    smooth = recent.index_select(0, nearest[None])[0, -1] > 0
    # In the warm-up the divisor is the statistic of the batch, in full precision.
    return torch.where(smooth, divisor, square), torch.stack([known, known & smooth])
