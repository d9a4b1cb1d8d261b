"""A trial of the user's own statistics before training starts, on moments that have the layers' shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stabnorm.functional.moments import MAX, MIN, VAR_N, VAR_X
from stabnorm.monitor.accumulators import Accumulators
from stabnorm.monitor.buffers import DeviceState
from stabnorm.monitor.details import Details
from stabnorm.monitor.past import Moments, Past
from stabnorm.monitor.statistics import CATALOGUE
from stabnorm.norms import NormLayer
from stabnorm.statistic import Statistic


@torch.no_grad()
def try_own_statistics(
    statistics: Sequence[Statistic],
    norms: Sequence[NormLayer],
    accumulators: Accumulators,
    device: torch.device,
    details: Details | None,
    past_class: type[Past],
) -> None:
    """Compute each statistic that is not of the catalogue once: 64 tokens of mean 0 and variance 1, with no past.

    Raises:
        ValueError: its function fails, or does not give one floating number per layer.
    """
    own = [statistic for statistic in statistics if statistic.name not in CATALOGUE]
    if not own:
        return
    state = DeviceState.of(norms, accumulators.width, device, past_class)
    raw, gradient = accumulators.take(device)
    raw.seen.fill_(64)
    raw.channel[:, [VAR_X, VAR_N, MAX]], raw.channel[:, MIN] = 1, -1
    raw.token.fill_(1)
    now = Moments.of(raw, gradient, state.layout)
    if details is not None:
        now = details.beside(now, details.slabs.take(device), ())
    for statistic in own:
        try:
            values = statistic.compute(now, state.past)
        except Exception as error:
            raise ValueError(
                f"statistic {statistic.name!r} failed on a trial: {type(error).__name__}: {error}. It is a function of "
                "(moments, past), see stabnorm.monitor.past and .detailed; what it reads there it must name in needs="
            ) from error
        if not isinstance(values, Tensor) or values.shape != (len(norms),) or not values.is_floating_point():
            given = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"statistic {statistic.name!r} gives {given}, not one floating number per layer, shape "
                f"({len(norms)},); reduce channels with moments.mean_over_channels"
            )
    accumulators.clear()
    if details is not None:
        details.discard()
