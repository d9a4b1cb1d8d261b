"""The moments of a step, and the past of each layer, with which a step is compared.

The layers are those of a band, see `stabnorm.monitor.bands`. Everything has the shape `[layers, ...]`, in float64 if
the device supports it. In float32 a running mean of 1e4 has an error of 1e-3, and several statistics measure its
distance from the mean of the batch. If a layer did not run in a step, or was not finite, its past does not change.
"""

import functools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabnorm.functional import RawMoments, explained_share
from stabnorm.functional.moments import COV_XN, MAX, MIN, REST_N, REST_X, SHIFT_N, SHIFT_X, STD_MEAN, VAR_N, VAR_X
from stabnorm.monitor.bands import Band

MOMENTUM = 0.1  # PyTorch's: the weight of the new value
WINDOW = 4  # Unified Normalization's M


@dataclass(frozen=True)
class Layout:
    """The fixed properties of the layers, `[L]` each, and which of the padded channels exist, `[L, C]`."""

    exists: Tensor | None  # None: every layer is as wide as the widest
    channels: Tensor
    eps: Tensor
    per_channel: Tensor  # a "batch" norm: affine in every channel, divides by the channels' variances
    own_buffers: Tensor | None  # the layer has running buffers of its own; None: no layer of the model has

    @staticmethod
    def of(band: Band, device: torch.device, with_buffers: bool) -> "Layout":
        """Read the properties of the layers of a band; `with_buffers` if a layer of the model has running buffers."""
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        sizes = torch.tensor([norm.num_features for norm in band.layers], device="cpu")
        uniform = all(norm.num_features == band.width for norm in band.layers)
        own_buffers = torch.tensor([norm.running_mean is not None for norm in band.layers], device=device)
        return Layout(
            exists=None if uniform else (torch.arange(band.width, device="cpu") < sizes[:, None]).to(device),
            channels=sizes.to(device, dtype),
            eps=torch.tensor([norm.eps for norm in band.layers], dtype=dtype, device=device),
            per_channel=torch.tensor([norm.kind == "batch" for norm in band.layers], device=device),
            own_buffers=own_buffers if with_buffers else None,
        )


@dataclass(frozen=True)
class Moments:
    """The merged moments of the layers in one step; every statistic is a function of them.

    Shapes: ``[L, C]`` per channel (padded with zeros beyond a layer's channels), ``[L]`` per layer.
    """

    layout: Layout
    count: Tensor
    channel: Tensor  # [L, rows, C], see functional.RawMoments
    token: Tensor  # [L, rows], the same
    gradient: Tensor  # [L, 2, C]: sums over tokens of g * xhat and of g, with g the gradient at the normalised input
    between: Tensor  # variance of the ranks' means; NaN where there is one process

    @staticmethod
    def of(raw: RawMoments, gradient: Tensor, layout: Layout, between: Tensor | None = None) -> "Moments":
        """Create them from raw moments, sums of gradients, and the variance between ranks if there are several."""
        dtype = layout.eps.dtype
        channel = raw.channel.to(dtype)
        between = torch.full_like(channel[:, VAR_X], torch.nan) if between is None else between.to(dtype)
        return Moments(layout, raw.seen, channel, raw.token.to(dtype), gradient.to(dtype), between)

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the input per channel."""
        return self.channel[:, SHIFT_X] + self.channel[:, REST_X]

    @property
    def var(self) -> Tensor:
        """Variance of the input per channel."""
        return self.channel[:, VAR_X]

    @property
    def mean_n(self) -> Tensor:
        """Mean of the normalised input per channel."""
        return self.channel[:, SHIFT_N] + self.channel[:, REST_N]

    @property
    def var_n(self) -> Tensor:
        """Variance of the normalised input per channel."""
        return self.channel[:, VAR_N]

    @property
    def cov_xn(self) -> Tensor:
        """Covariance of the input and the normalised input per channel."""
        return self.channel[:, COV_XN]

    @cached_property
    def absmax(self) -> Tensor:
        """Largest magnitude of the input per channel."""
        return torch.maximum(self.channel[:, MAX], -self.channel[:, MIN])

    def mean_over_channels(self, values: Tensor) -> Tensor:
        """``[L, C] -> [L]``, over the channels that exist."""
        if self.layout.exists is None:
            return values.mean(-1)
        return torch.where(self.layout.exists, values, 0).sum(-1) / self.layout.channels

    def median_over_channels(self, values: Tensor) -> Tensor:
        """``[L, C] -> [L]``, over the channels that exist; NaN where one of them is."""
        values = values if self.layout.exists is None else values.masked_fill(~self.layout.exists, torch.inf)
        ascending = values.sort(-1).values
        last = self.layout.channels.long()[:, None] - 1
        middle = 0.5 * (ascending.gather(-1, last // 2) + ascending.gather(-1, (last + 1) // 2))
        return torch.where(values.isnan().any(-1), torch.nan, middle[:, 0])

    def max_over_channels(self, values: Tensor) -> Tensor:
        """``[L, C] -> [L]``, over the channels that exist."""
        return (values if self.layout.exists is None else values.masked_fill(~self.layout.exists, -torch.inf)).amax(-1)

    def norm_over_channels(self, values: Tensor) -> Tensor:
        """Euclidean norm over the channels that exist, ``[L, C] -> [L]``."""
        if self.layout.exists is not None:
            values = torch.where(self.layout.exists, values, 0)
        norm: Tensor = torch.linalg.vector_norm(values, dim=-1)
        return norm

    @cached_property
    def ran(self) -> Tensor:
        """Whether the layer saw a valid token, ``[L]``."""
        return self.count > 0

    @cached_property
    def finite(self) -> Tensor:
        """Whether every channel's moments are finite, ``[L, C]``."""
        return torch.isfinite(self.mean) & torch.isfinite(self.var) & torch.isfinite(self.absmax)

    @cached_property
    def second_moment(self) -> Tensor:
        """Mean of x^2 per channel, as a sum of two squares, which has no cancellation."""
        return self.var + self.mean.square()

    @cached_property
    def sigma(self) -> Tensor:
        """sqrt(var + eps) per channel: what BatchNorm would divide by."""
        return (self.var + self.layout.eps[:, None]).sqrt()

    @cached_property
    def log_var(self) -> Tensor:
        """log(var + eps) per channel; eps hides the rounding noise of a dead channel."""
        return (self.var + self.layout.eps[:, None]).log()

    @cached_property
    def log_absmax(self) -> Tensor:
        """log(max|x| + sqrt(eps)) per channel."""
        return (self.absmax + self.layout.eps[:, None].sqrt()).log()

    @cached_property
    def log_scale(self) -> Tensor:
        """log(mean token standard deviation + sqrt(eps)) per layer."""
        return (self.token[:, STD_MEAN] + self.layout.eps.sqrt()).log()

    @cached_property
    def affine_residual(self) -> Tensor:
        """1 - mean_c corr_n(x_c, n_c)^2 per layer; 0 for a "batch" norm."""
        explained = explained_share(self.var, self.cov_xn, self.var_n, self.mean_n)
        residual = (1 - self.mean_over_channels(explained)).clamp(min=0)
        return torch.where(self.layout.per_channel, 0, residual)

    @cached_property
    def gain_gradient(self) -> Tensor:
        """Mean over tokens of g * xhat, per channel."""
        return self.gradient[:, 0] / self.count.clamp(min=1)[:, None]


# The rows of `Past.channel`, and how many there are of each.
CHANNEL_ROWS = {"mean": 1, "var": 1, "mean_var": 1, "log_var": 1, "log_absmax": 1, "window": WINDOW, "gradient": 1}
(MEAN, VAR, MEAN_VAR, LOG_VAR, LOG_ABSMAX, FIRST), GRADIENT = range(6), 5 + WINDOW  # FIRST: of the window
LOG_SCALE, GRADIENT_POWER = range(2)  # the rows of `Past.layer`


class Past:
    """Moving averages, the previous step and the window of second moments of every layer.

    NaN means that there is no past yet; every statistic that needs one is then NaN, too.

    Args:
        layout: the layers.
        width: the widest one's channels.

    Attributes:
        channel: ``[L, rows, C]``, see `CHANNEL_ROWS`.
        layer: ``[L, rows]``, the logarithm of the scale and the average power of the gradient.
        own: ``[L, 2, C]``, the layers' own running means and variances after the last step; None if no layer of
            the model has any.
    """

    def __init__(self, layout: Layout, width: int) -> None:
        self.layout = layout
        self.channel = self._nothing(sum(CHANNEL_ROWS.values()), width)
        self.layer = self._nothing(2)
        self.own = None if layout.own_buffers is None else self._nothing(2, width)

    def _nothing(self, *shape: int) -> Tensor:
        return self.layout.eps.new_full((len(self.layout.eps), *shape), torch.nan)

    @property
    def mean(self) -> Tensor:
        """Moving average of the mean, per channel."""
        return self.channel[:, MEAN]

    @property
    def var(self) -> Tensor:
        """Moving average of the variance, per channel."""
        return self.channel[:, VAR]

    @property
    def mean_var(self) -> Tensor:
        """Moving variance of the batch mean, per channel."""
        return self.channel[:, MEAN_VAR]

    @property
    def log_var(self) -> Tensor:
        """`Moments.log_var` of the last step."""
        return self.channel[:, LOG_VAR]

    @property
    def log_absmax(self) -> Tensor:
        """`Moments.log_absmax` of the last step."""
        return self.channel[:, LOG_ABSMAX]

    @property
    def window(self) -> Tensor:
        """Second moments of the last steps, newest first, ``[L, M, C]``."""
        return self.channel[:, FIRST:GRADIENT]

    @property
    def gradient(self) -> Tensor:
        """Moving average of `Moments.gain_gradient`."""
        return self.channel[:, GRADIENT]

    @property
    def log_scale(self) -> Tensor:
        """`Moments.log_scale` of the last step."""
        return self.layer[:, LOG_SCALE]

    @property
    def gradient_power(self) -> Tensor:
        """Moving average of the squared norm of `Moments.gain_gradient`, per layer."""
        return self.layer[:, GRADIENT_POWER]

    @cached_property
    def _own_buffers(self) -> Tensor:
        assert self.layout.own_buffers is not None
        return self.layout.own_buffers[:, None]

    @property
    def running_mean(self) -> Tensor:
        """The layer's own running mean; of a layer that has none, the moving average."""
        return self.mean if self.own is None else torch.where(self._own_buffers, self.own[:, 0], self.mean)

    @property
    def running_var(self) -> Tensor:
        """The same for the variance."""
        return self.var if self.own is None else torch.where(self._own_buffers, self.own[:, 1], self.var)

    def mean_var_with(self, now: Moments) -> Tensor:
        """Moving variance of the batch mean, this step included."""
        return (1 - MOMENTUM) * (self.mean_var + MOMENTUM * (now.mean - self.mean).square())

    def window_with(self, now: Moments) -> Tensor:
        """The window of second moments, this step included: ``[L, M, C]``."""
        # A 0, of a dead channel, would make the geometric mean 0 as long as it is in the window.
        new = now.second_moment.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return torch.cat([new, self.window[:, :-1]], 1)

    def update(self, now: Moments) -> None:
        """Add the step to `channel` and `layer`; `standard_step` in C++ does the same."""
        usable = now.ran & now.finite.all(-1)
        # The row of a narrower layer ends with NaN, because these channels have no gradient.
        gradient = now.gain_gradient
        power = now.norm_over_channels(gradient).square()
        with_gradient = usable & torch.isfinite(power)  # not so after an overflow of the loss scale

        averages = average(self.channel[:, : VAR + 1], torch.stack([now.mean, now.var], 1))
        mean_var = torch.where(self.mean.isnan(), 0, self.mean_var_with(now))
        others = torch.stack([mean_var, now.log_var, now.log_absmax], 1)
        new = torch.cat([averages, others, self.window_with(now)], 1)
        of_gradient = average(self.gradient, gradient)
        self.channel = torch.cat(
            [
                torch.where(usable[:, None, None], new, self.channel[:, :GRADIENT]),
                torch.where(with_gradient[:, None], of_gradient, self.gradient)[:, None],
            ],
            1,
        )
        scale = torch.where(usable, now.log_scale, self.log_scale)
        power = torch.where(with_gradient, average(self.gradient_power, power), self.gradient_power)
        self.layer = torch.stack([scale, power], 1)

    def update_details(self, now: Moments) -> None:
        """Add what only a `DetailedPast` remembers."""

    def channel_rows(self) -> dict[str, Tensor]:
        """What is remembered per channel, by name, as views ``[L, rows, C]`` that can be written."""
        names = dict(zip(CHANNEL_ROWS, self.channel.split([*CHANNEL_ROWS.values()], 1), strict=True))
        own = {} if self.own is None else {"running_mean": self.own[:, :1], "running_var": self.own[:, 1:]}
        return names | own

    def layer_rows(self) -> dict[str, Tensor]:
        """What is remembered per layer, by name, as views ``[L, rows]`` that can be written."""
        return {"log_scale": self.layer[:, :1], "gradient_power": self.layer[:, 1:]}


def average(old: Tensor, new: Tensor) -> Tensor:
    """The moving average with the new value; the new value itself where there is no past."""
    return torch.where(old.isnan(), new, torch.lerp(old, new, MOMENTUM))


def running_buffers(band: Band, layout: Layout) -> Tensor | None:
    """Return running means and variances, ``[L, 2, C]``, NaN for layers without any; None if none has some."""
    if layout.own_buffers is None:
        return None
    device, parts = layout.eps.device, list[Tensor]()
    nothing = _nothing(band.width, device)
    for norm in band.layers:
        for buffer in (norm.running_mean, norm.running_var):
            known = [] if buffer is None else [buffer.detach().flatten().to(device, non_blocking=True)]
            parts += [*known, nothing[: band.width - sum(map(len, known))]]
    return torch.cat(parts).to(layout.eps.dtype).view(len(band.layers), 2, band.width)  # two launches for all layers


@functools.cache
def _nothing(length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((length,), torch.nan, dtype=torch.float32, device=device)
