"""BatchChannelNorm and EstBatchNorm: norms for micro-batches, behind standardized weights (arXiv 1903.10520)."""

import torch
from torch import Tensor, nn

from stabnorm._checks import check_count, check_number
from stabnorm.nn._base import Float32Buffers
from stabnorm.nn._channel_norm import ChannelNorm
from stabnorm.norms import register_norm
from stabnorm.ops.running import track_batch_


class EstBatchNorm(ChannelNorm):
    r"""Batch norm with estimated statistics, in training as in eval (arXiv:1903.10520): one affine map per channel.

    .. math:: y = \gamma \frac{x - \hat\mu}{\sqrt{\hat\sigma^2 + \epsilon}} + \beta

    .. math:: \hat\mu \leftarrow \hat\mu + m\, (\mu_B - \hat\mu),\qquad
              \hat\sigma^2 \leftarrow \hat\sigma^2 + m\, (\sigma^2_B - \hat\sigma^2)

    A batch changes the estimates first and is then normalised with them, so training and eval compute the same. No
    gradient goes through the estimates. With one or two images per device they are far less noisy than the statistics
    of the batch. The published code takes the batch's variance around the old estimate of the mean, so that an input
    with a large mean gives large variances at first; here it is the unbiased variance around the batch's own mean. A
    batch with a value that is not finite, or without a valid token, does not change the estimates.

    Args:
        num_features: number of channels, C.
        eps: added to the variance. Default: 1e-5.
        momentum: m, the weight of a batch in the estimates; at 0 they never change. Default: 0.1.
        channel_dim: axis of the input that holds the channels. Default: 1, as in images.
        sync: merge the statistics of a batch over ranks. Default: False.

    Shape:
        ``[N, C, ...]`` to the same shape. `mask` has the shape without the channel axis.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range.

    >>> norm, x = EstBatchNorm(4), torch.randn(2, 4, 5, 5)
    >>> y = norm(x)
    >>> torch.equal(norm.eval()(x), y)
    True
    """

    center = True
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        channel_dim: int = 1,
        sync: bool = False,
    ) -> None:
        super().__init__(num_features, eps, channel_dim, sync)
        check_number("momentum", momentum, least=0, most=1)
        self.momentum = momentum
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(num_features))
        self.register_buffer("running_mean", torch.empty(num_features))
        self.register_buffer("running_var", torch.empty(num_features))
        self._add_counters()
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Reset the estimates."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self._reset_counters()

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalise; in training mode also update the estimates, before."""
        rows, valid = self.rows_of(x, mask)
        if self.training:
            self._estimate(rows, valid)
        # A later forward changes the buffers in place, which the backward of this one still needs.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        return self.like_input(self.eval_affine(rows, mean, var, self.weight, self.bias, None), x)

    @torch.no_grad()
    def _estimate(self, rows: Tensor, valid: Tensor | None) -> None:
        moments = self.moments(rows, valid, center=True)
        track_batch_(
            moments.mean, moments.square, moments.rows, self.running_mean, self.running_var, None, self.step,
            self.skips, self.progress, 0, float(self.momentum), self.eps, self.counts_steps,
        )  # fmt: skip

    def frozen_affine(self) -> tuple[Tensor, Tensor | None]:
        """Return scale and shift, in the buffers' precision."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Return mean and variance."""
        return self.running_mean, self.running_var

    def extra_repr(self) -> str:
        """Return the arguments."""
        channels = "" if self.channel_dim == 1 else f", channel_dim={self.channel_dim}"
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}{channels}" + ", sync=True" * self.sync


class BatchChannelNorm(Float32Buffers):
    r"""Batch norm, then a norm over groups of channels of each sample (arXiv:1903.10520).

    .. math:: y = \gamma_g \frac{z - \mu_{n,g}}{\sqrt{\sigma^2_{n,g} + \epsilon}} + \beta_g,\qquad
              z = \mathrm{EstBatchNorm}(x)

    with one gain and bias for each group g. The second norm reads each sample at inference, so the module does not fold
    as a whole; `fold_norms` folds the batch norm in it.

    Args:
        num_features: number of channels, C.
        groups: number of groups of channels. Default: 32, as in the paper.
        eps: added to variances. Default: 1e-5.
        momentum: of the estimates, see `EstBatchNorm`. Default: 0.1.
        channel_dim: axis of the input that holds the channels. Default: 1, as in images.
        sync: merge the statistics of a batch over ranks. Default: False.

    Shape:
        ``[N, C, ...]`` to the same shape.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range, or `groups` does not divide `num_features`.

    >>> y = BatchChannelNorm(8, groups=2)(torch.randn(3, 8, 5, 5))
    >>> bool(y.unflatten(1, (2, 4)).mean((2, 3, 4)).abs().max() < 1e-5)
    True
    """

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        channel_dim: int = 1,
        sync: bool = False,
    ) -> None:
        super().__init__()
        check_count("groups", groups)
        self.batch = EstBatchNorm(num_features, eps, momentum, channel_dim=channel_dim, sync=sync)
        if num_features % groups:
            raise ValueError(f"groups={groups} does not divide num_features={num_features}. Give a divisor")
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(groups)), nn.Parameter(torch.zeros(groups))

    def reset_parameters(self) -> None:
        """Reset parameters and estimates."""
        self.batch.reset_parameters()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; in training mode also update the estimates, before."""
        z = self.batch(x, mask)
        size = self.batch.num_features // self.groups
        images = z.movedim(self.batch.channel_dim, 1) if self.batch.channel_dim != 1 else z
        gain, bias = self.weight.repeat_interleave(size), self.bias.repeat_interleave(size)
        y = nn.functional.group_norm(images, self.groups, gain.to(z.dtype), bias.to(z.dtype), self.eps)
        return y.movedim(1, self.batch.channel_dim) if self.batch.channel_dim != 1 else y

    def extra_repr(self) -> str:
        """Return the arguments that its child does not show."""
        return f"groups={self.groups}, eps={self.eps}"


register_norm(EstBatchNorm, "batch", channel_dim="channel_dim")
