"""A trial of the user's own statistics before training starts, on moments that have the layers' shapes."""

import torch
from torch import Tensor

from stabnorm.functional.moments import MAX, MIN, VAR_N, VAR_X
from stabnorm.monitor.measure import Measurement
from stabnorm.monitor.past import Moments, Past
from stabnorm.monitor.statistics import CATALOGUE
from stabnorm.statistic import Statistic


@torch.no_grad()
def try_own_statistics(measurement: Measurement, device: torch.device) -> None:
    """Compute each statistic that is not of the catalogue once: 64 tokens of mean 0 and variance 1, with no past.

    The moments are written into the accumulators, which must be emptied after it.

    Raises:
        ValueError: its function fails, or does not give one floating number per layer.
    """
    own = [statistic for statistic in measurement.statistics if statistic.name not in CATALOGUE]
    if not own:
        return
    states = measurement.fresh_states(device)
    for state, gathered in zip(states, measurement.gathered(states, device), strict=True):
        raw = gathered.moments
        raw.seen.fill_(64)
        raw.channel[:, [VAR_X, VAR_N, MAX]], raw.channel[:, MIN] = 1, -1
        raw.token.fill_(1)
        now = measurement.moments(state, gathered, ())
        for statistic in own:
            _try(statistic, now, state.past, len(state.band.layers))


def _try(statistic: Statistic, now: Moments, past: Past, layers: int) -> None:
    try:
        values = statistic.compute(now, past)
    except Exception as error:
        raise ValueError(
            f"statistic {statistic.name!r} failed on a trial: {type(error).__name__}: {error}. It is a function of "
            "(moments, past), see stabnorm.monitor.past and .detailed; what it reads there it must name in needs="
        ) from error
    if not isinstance(values, Tensor) or values.shape != (layers,) or not values.is_floating_point():
        given = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"statistic {statistic.name!r} gives {given}, not one floating number per layer, shape ({layers},); "
            "reduce channels with moments.mean_over_channels"
        )
