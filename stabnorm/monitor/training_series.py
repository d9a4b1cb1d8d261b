"""The series beside the layers: the loss and the norm of the gradient, watched as a layer's statistics are.

On 84 logs of other people's trainings the two together alarm where one of them misses (`benchmarks/public_logs.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stabnorm.monitor.alerts import TRAINING, Alert, Departure
from stabnorm.monitor.detect import RobustDetector
from stabnorm.statistic import Statistic

Array = npt.NDArray[np.floating[Any]]

LOSS = Statistic(
    "loss", formula="the loss of the step", source="ours", floor=0.1, upward=True,
    advice="the loss left its usual range: look at the batches of these steps",
)  # fmt: skip
GRADIENT_NORM = Statistic(
    "gradient_norm", formula="|g|_2 over all parameters, before clipping", unit="gradient", source="ours", floor=0.1,
    upward=True, advice="the norm of the gradient left its usual range: look at the batches of these steps",
)  # fmt: skip


class TrainingSeries:
    """Watches the loss and the norm of the gradient; a series that is never given raises nothing.

    >>> watched = TrainingSeries()
    >>> loss = np.r_[np.ones(300), 3 * np.ones(10)]
    >>> [(alert.step, alert.layer, alert.statistic) for alert in watched.update(0, {"loss": loss})]
    [(301, 'training', 'loss')]
    """

    statistics = (LOSS, GRADIENT_NORM)

    def __init__(self) -> None:
        self.detector = RobustDetector(self.statistics, [TRAINING])

    def update(self, first_step: int, series: Mapping[str, Array], nonfinite: Array | None = None) -> list[Alert]:
        """Read the next steps on the host, and return their alerts.

        Args:
            first_step: the step of the first values.
            series: values of the steps by name, ``[steps]`` each.
            nonfinite: ``[steps]``, not 0 where a value that was given is NaN or infinite. Default: none is.
        """
        steps = max([*map(len, series.values()), 0 if nonfinite is None else len(nonfinite)])
        values = np.full((steps, 1, len(self.statistics)), np.nan, np.float32)
        for column, statistic in enumerate(self.statistics):
            if statistic.name in series:
                values[:, 0, column] = series[statistic.name]
        bad = np.zeros(steps, bool) if nonfinite is None else nonfinite > 0
        alerts = self.detector.update(
            first_step, torch.from_numpy(values), torch.full((steps, 1), torch.inf, device="cpu"),
            torch.from_numpy(bad[:, None]),
        )  # fmt: skip
        return [_in_words(alert) for alert in alerts]

    def take_departures(self) -> list[Departure]:
        """Return every departure since the last call."""
        return self.detector.take_departures()


def _in_words(alert: Alert) -> Alert:
    if alert.kind == "nonfinite":
        return dataclasses.replace(alert, reason="the loss is NaN or infinite: look at this step's batch")
    reason = alert.reason.replace("what feeds this layer, and at what", "the batches of these steps, and at what")
    return dataclasses.replace(alert, reason=reason)
