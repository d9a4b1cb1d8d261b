"""`Moments` and `Past` with additional data for the costlier statistics, see `Statistic.needs` and `remembers`."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from stabnorm.functional.detail import DetailMoments
from stabnorm.monitor.parameter_values import Parameters
from stabnorm.monitor.past import Layout, Moments, Past

SPIKE_MOMENTUM = 0.01  # momentum of the average gradient with which a spike is compared
SPIKE_STEPS = 10  # steps in this average before it is used


@dataclass(frozen=True)
class DetailedMoments(Moments):
    """`Moments` with additional data, which are NaN or 0 if no chosen statistic names them in its `needs`.

    Attributes:
        detail: the merged detail moments of all layers, ``[L, ...]``.
        parameters: gains and biases of all layers as they are after the optimizer step.
        adam: ``[L, 2]``, see `parameter_values.adam_figures`.
    """

    detail: DetailMoments
    parameters: Parameters
    adam: Tensor

    @staticmethod
    def beside(now: Moments, detail: DetailMoments, parameters: Parameters, adam: Tensor) -> "DetailedMoments":
        """Combine the moments of a step with the additional data."""
        moments = {field.name: getattr(now, field.name) for field in fields(Moments)}
        return DetailedMoments(**moments, detail=detail, parameters=parameters, adam=adam)


class DetailedPast(Past):
    """`Past` with additional data with which some statistics compare a step.

    Attributes:
        gain, first_bias: ``[L, C]``, the gain after the last step, and the bias after the first one.
        gradient_size: ``[L, 2, C]``, average magnitude of the gradients of gain and bias.
        gradient_steps: ``[L, 2]``, how many steps are in it.
    """

    def __init__(self, layout: Layout, width: int) -> None:
        super().__init__(layout, width)
        self.gain, self.first_bias = self._nothing(width), self._nothing(width)
        self.gradient_size = self._nothing(2, width)
        self.gradient_steps = torch.zeros_like(self.layer)

    def update_details(self, now: Moments) -> None:
        """Add the step to what stands above."""
        assert isinstance(now, DetailedMoments)  # a monitor whose past this is gathers them
        self.gain = now.parameters.gain
        self.first_bias = torch.where(self.first_bias.isnan(), now.parameters.bias, self.first_bias)
        size = now.gradient.abs()
        usable = now.ran[:, None] & torch.isfinite(now.norm_over_channels(size.transpose(0, 1)).transpose(0, 1))
        self.gradient_steps = self.gradient_steps + usable
        weight = (1 / self.gradient_steps.clamp(min=1)).clamp(min=SPIKE_MOMENTUM)[..., None]
        average = torch.where(self.gradient_size.isnan(), size, torch.lerp(self.gradient_size, size, weight))
        self.gradient_size = torch.where(usable[..., None], average, self.gradient_size)

    def channel_rows(self) -> dict[str, Tensor]:
        """See `Past.channel_rows`."""
        more = {"gain": self.gain[:, None], "first_bias": self.first_bias[:, None], "gradient_size": self.gradient_size}
        return super().channel_rows() | more

    def layer_rows(self) -> dict[str, Tensor]:
        """See `Past.layer_rows`."""
        return super().layer_rows() | {"gradient_steps": self.gradient_steps}
