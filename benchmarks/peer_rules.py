"""Rules that tell a loss spike by one series of numbers, beside which our detector is measured.

Most are those of others; `above_past` is our own detector's rule, for one series. Each takes the loss or the norm of
the gradient at every step, and yields the steps of its alarms. Where alarms are counted, `events` makes one of those
that follow each other closely: a rule that goes on alarming is counted once, as a detector is that stays silent until
all is calm again.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

PAUSE = 100
Series = npt.NDArray[np.float64]
Rule = Callable[[Series], Iterator[int]]


def spike_detection(losses: Series, window: int = 10, rtol: float = 2.0) -> Iterator[int]:
    """Lightning's `SpikeDetection` with its defaults: three times the mean of the last ten losses, and rising.

    A loss that is a spike does not enter the mean. What Lightning does then, to end the training, is left out.
    """
    seen = deque[float](maxlen=window)
    last = 0.0
    for step, loss in enumerate(losses):
        mean = sum(seen) / len(seen) if seen else math.nan
        rises = loss - last > 0 and abs(loss - mean) >= abs(rtol * mean)
        if step >= 1 and (not math.isfinite(loss) or rises):
            yield step
        else:
            seen.append(float(loss))
            last = float(loss)


def olmo_core(values: Series, window: int = 128, sigmas: float = 6.0) -> Iterator[int]:
    """OLMo-core's `SkipStepOptimizer`: six standard deviations above the mean of the last 128 steps."""
    for step, value in enumerate(values):
        before = values[max(0, step - window) : step]
        if len(before) >= window // 2 and not value <= before.mean() + sigmas * before.std(ddof=1):
            yield step


def zclip(norms: Series, alpha: float = 0.97, warm_up: int = 25, bound: float = 2.5) -> Iterator[int]:
    """ZClip (arXiv 2504.02507): a z-score of the gradient's norm above 2.5; its clipped value enters the averages.

    As its authors' code does it by default: mode "zscore", option "adaptive_scaling", the mean before the variance. A
    norm that is not finite stays in the averages there, so that the rule is silent from then on.
    """
    mean, variance = float(norms[:warm_up].mean()), float(norms[:warm_up].var())
    for step, norm in enumerate(norms[warm_up:].tolist(), warm_up):
        scale = math.sqrt(variance)
        z = (norm - mean) / (scale + 1e-6)
        if z > bound:
            yield step
            norm = mean + bound / z * bound * scale
        mean = alpha * mean + (1 - alpha) * norm
        variance = alpha * variance + (1 - alpha) * (norm - mean) ** 2


def above_median(values: Series, window: int = 128, times: float = 1.5) -> Iterator[int]:
    """A plain rule: 1.5 times the median of the last 128 steps."""
    for step, value in enumerate(values):
        before = values[max(0, step - window) : step]
        if len(before) >= window // 2 and not value <= times * np.nanmedian(before):
            yield step


def above_past(values: Series, window: int = 128, bound: float = 6.0, learnt: int = 256) -> Iterator[int]:
    """Our own detector's rule, upwards only, on one series.

    The logarithm is six robust standard deviations above the median of the last 128 steps at two steps, or twelve at
    one; a robust standard deviation is 0.1 at least.
    """
    logs = np.log(np.maximum(np.nan_to_num(values, nan=1.0), 1e-30))
    last = 0.0
    for step in range(learnt, len(logs)):
        before = logs[step - window : step]
        middle = float(np.median(before))
        score = (logs[step] - middle) / max(1.4826 * float(np.median(np.abs(before - middle))), 0.1)
        held, last = max(min(score, last), score / 2), score
        if held > bound or not math.isfinite(values[step]):
            yield step


def events(steps: Iterable[int], pause: int = PAUSE) -> list[int]:
    """Return the first step of each event; an alarm that comes within `pause` steps of another belongs to its event.

    >>> events([3, 50, 103, 104, 205])
    [3, 205]
    """
    firsts, last = list[int](), -math.inf
    for step in steps:
        if step - last > pause:
            firsts.append(step)
        last = step
    return firsts


LOSS_RULES: dict[str, Rule] = {
    "Lightning SpikeDetection": spike_detection,
    "OLMo-core, loss": olmo_core,
    "loss, by our rule": above_past,
    "loss > 1.5 median": above_median,
}
GRADIENT_RULES: dict[str, Rule] = {
    "OLMo-core, gradient norm": olmo_core,
    "gradient norm, by our rule": above_past,
    "ZClip": zclip,
}
