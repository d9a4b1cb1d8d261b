"""The past of each layer, with which a step is compared, as tensors that a checkpoint can hold.

Everything has the shape `[layers, ...]`, in float64 if the device supports it. In float32 a running mean of 1e4 has an
error of 1e-3, and several statistics measure its distance from the mean of the batch. If a layer did not run in a step,
or was not finite, its past does not change.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabnorm.functional import RawMoments, explained_share
from stabnorm.functional.moments import COV_XN, MAX, MIN, REST_N, REST_X, SHIFT_N, SHIFT_X, STD_MEAN, VAR_N, VAR_X

MOMENTUM = 0.1  # PyTorch's: the weight of the new value
WINDOW = 4  # Unified Normalization's M


@dataclass(frozen=True)
class Layout:
    """The fixed properties of the layers, `[L]` each, and which of the padded channels exist, `[L, C]`."""

    exists: Tensor | None  # None: every layer is as wide as the widest
    channels: Tensor
    eps: Tensor
    per_channel: Tensor  # a "batch" norm: affine in every channel, divides by the channels' variances
    own_buffers: Tensor  # the layer has running buffers of its own


@dataclass(frozen=True)
class Moments:
    """The merged moments of all layers in one step; every statistic is a function of them.

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


class Past:
    """Moving averages, the previous step and the window of second moments of every layer.

    Args:
        layers: number of layers.
        channels: the widest layer's channels.
        device, dtype: where and how the step is computed.
    """

    def __init__(self, layers: int, channels: int, device: torch.device, dtype: torch.dtype) -> None:
        def nothing(*shape: int) -> Tensor:
            return torch.full(shape, torch.nan, device=device, dtype=dtype)

        # NaN means "no past yet"; every statistic that needs a past is then NaN, too.
        self.mean, self.var = nothing(layers, channels), nothing(layers, channels)  # moving averages
        self.mean_var = nothing(layers, channels)  # moving variance of the batch mean
        self.running_mean, self.running_var = nothing(layers, channels), nothing(layers, channels)
        self.log_var, self.log_absmax = nothing(layers, channels), nothing(layers, channels)
        self.log_scale = nothing(layers)
        self.window = nothing(WINDOW, layers, channels)  # second moments, newest first
        self.log_window = nothing(WINDOW, layers, channels)
        self.gradient, self.gradient_power = nothing(layers, channels), nothing(layers)

    def mean_var_with(self, now: Moments) -> Tensor:
        """Moving variance of the batch mean, this step included."""
        return (1 - MOMENTUM) * (self.mean_var + MOMENTUM * (now.mean - self.mean).square())

    def windows_with(self, now: Moments) -> tuple[Tensor, Tensor]:
        """The window of second moments, and of their logarithms, this step included: ``[M, L, C]``."""
        # The log of 0, of a dead channel, would make its geometric mean 0 as long as it is in the window.
        new = now.second_moment.clamp(min=torch.finfo(torch.float32).tiny)[None]
        return torch.cat([new, self.window[:-1]]), torch.cat([new.log(), self.log_window[:-1]])

    def update(self, now: Moments, own_mean: Tensor, own_var: Tensor) -> None:
        """Add the step.

        Args:
            now: the step.
            own_mean: ``[L, C]``, the layers' own running means after the step; anything where there are none.
            own_var: the same for the variances.
        """
        usable = now.ran & now.finite.all(-1)

        def take(old: Tensor, new: Tensor) -> Tensor:
            keep = usable.view(-1, *[1] * (old.ndim - 1))
            return torch.where(keep, new, old)

        def average(old: Tensor, new: Tensor) -> Tensor:
            return torch.where(old.isnan(), new, torch.lerp(old, new, MOMENTUM))

        first = self.mean.isnan()
        self.mean_var = take(self.mean_var, torch.where(first, 0, self.mean_var_with(now)))
        self.mean = take(self.mean, average(self.mean, now.mean))
        self.var = take(self.var, average(self.var, now.var))
        own = now.layout.own_buffers[:, None]
        self.running_mean = torch.where(own, own_mean, self.mean)
        self.running_var = torch.where(own, own_var, self.var)
        self.log_var = take(self.log_var, now.log_var)
        self.log_absmax = take(self.log_absmax, now.log_absmax)
        self.log_scale = take(self.log_scale, now.log_scale)
        windows = self.windows_with(now)
        self.window = torch.where(usable[None, :, None], windows[0], self.window)
        self.log_window = torch.where(usable[None, :, None], windows[1], self.log_window)
        # The row of a narrower layer ends with NaN, because these channels have no gradient.
        gradient = now.gain_gradient
        power = now.norm_over_channels(gradient).square()
        usable = usable & torch.isfinite(power)  # not so after an overflow of the loss scale
        self.gradient_power = take(self.gradient_power, average(self.gradient_power, power))
        self.gradient = take(self.gradient, average(self.gradient, gradient))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the past as plain tensors."""
        return {name: value.detach().clone() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved past of the same layers.

        Raises:
            ValueError: when a tensor is missing or has another shape; nothing is loaded then.
        """
        for name, value in vars(self).items():
            if name not in state or state[name].shape != value.shape:
                saved = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"the saved past has {saved} under {name!r}, expected shape {tuple(value.shape)}")
        for name, value in vars(self).items():
            setattr(self, name, state[name].to(value))
