"""UnifiedNorm: batch statistics smoothed over a window of batches, with a filter for outliers."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stabnorm._checks import check_count, check_flag, check_number
from stabnorm.functional import channel_affine
from stabnorm.nn._base import TARGETS
from stabnorm.nn._channel_norm import ChannelNorm
from stabnorm.nn._normalize import Psi, normalize
from stabnorm.nn.rep import check_filtration
from stabnorm.norms import NormLayer, register_norm
from stabnorm.ops.running import REMEMBERED, smooth_square_

NEVER = 2**62  # number of steps of a warm-up that does not end


class UnifiedNorm(ChannelNorm):
    r"""Unified Normalization over the last dimension (arXiv:2208.01313, eq. 8 to 12), affine in eval.

    .. math:: y = \gamma \frac{x}{\sqrt{\hat\sigma^2 + \epsilon}} + \beta,\qquad
              dx = \frac{dz - \psi z}{\sqrt{\hat\sigma^2 + \epsilon}}

    z is the normalised input, and dz = gamma dy. sigma^2 is the geometric mean of the last M second moments. psi is a
    running average over the means of the last M values of mean(dz z). During the warm-up, and for a batch that the
    filter takes for an outlier, both are the statistics of the batch, and the gradient is exact. Such an outlier, a
    batch with a value that is not finite, and padding do not change any state.

    Args:
        num_features: number of channels, C.
        window: number of batches M, or a pair for (forward, backward). With 1 the statistic is that of the batch, with
            its exact gradient. Default: 4.
        warmup_steps: number of steps without smoothing. Default: 4000.
        filtration: "calibrated", or None for no filter; the official variant also has "official". Use a window of 4 or
            more with a filter: with 2 it has nothing to compare with, and rejects every second batch.
            Default: "calibrated".
        patience: number of outliers in a row after which they count as normal, and the window starts again.
            Default: twice the window.
        momentum: weight of the new value in the running averages. Default: 0.1.
        eps: added to the second moment. Default: 1e-5.
        bias: False leaves beta out. Default: True.
        channel_dim: axis of the input that holds the channels. Default: -1.
        sync: merge statistics over ranks. Default: False.
        variant: "official" runs the published code, see `stabnorm.nn.official`. Default: "corrected".

    Shape:
        ``[..., C]`` to the same shape, with C on the axis `channel_dim`. `mask` has the shape without that axis.

    Raises:
        ValueError: an argument is out of range.

    Each training forward counts as a step in the buffer `step`. A training loop may set `counts_steps = False` and
    write `step` itself. Under AMP with a loss scale, write the scale into the buffer `loss_scale` before the backward.

    >>> norm = UnifiedNorm(8, warmup_steps=0)
    >>> x = torch.randn(4, 6, 8)
    >>> bool(norm(x).square().mean((0, 1)).sub(1).abs().max() < 1e-3)
    True
    >>> scale, shift, channel_dim = norm.eval().fold_affine()
    >>> torch.allclose(norm(x).double(), x * scale + shift, atol=1e-6)
    True
    """

    filtrations: ClassVar[tuple[str, ...]] = ("calibrated",)
    running_square: Tensor
    window_square: Tensor
    window_gradient: Tensor
    average_gradient: Tensor
    filled_gradient: Tensor
    recent: Tensor

    def __init__(
        self,
        num_features: int,
        window: int | tuple[int, int] = 4,
        warmup_steps: int = 4000,
        filtration: str | None = "calibrated",
        patience: int | None = None,
        momentum: float = 0.1,
        eps: float = 1e-5,
        bias: bool = True,
        *,
        channel_dim: int = -1,
        sync: bool = False,
        variant: str = "corrected",
    ) -> None:
        del variant  # it has chosen the class
        super().__init__(num_features, eps, channel_dim, sync)
        check_filtration(filtration, self.filtrations)
        windows = tuple(window) if isinstance(window, tuple | list) else (window, window)
        if len(windows) != 2:
            raise ValueError(f"window={window!r} is no pair. Give a number of batches, or one for each direction")
        for batches in windows:
            check_count("window", batches, hint=": batches, or a pair of such numbers")
        check_count("warmup_steps", warmup_steps, 0)
        if patience is not None:
            check_count("patience", patience, hint=": batches, or None for two windows")
        check_number("momentum", momentum, least=0, most=1)
        check_flag("bias", bias)
        self.windows, self.warmup_steps, self.filtration = windows, warmup_steps, filtration
        self.patience = 2 * windows[0] if patience is None else patience
        self.momentum = momentum
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features)) if bias else None
        self._add_state()
        self.reset_parameters()

    def _add_state(self) -> None:
        self.register_buffer("running_square", torch.empty(self.num_features))
        self.register_buffer("window_square", torch.empty(self.windows[0], self.num_features))
        self.register_buffer("window_gradient", torch.empty(self.windows[1], self.num_features))
        self.register_buffer("average_gradient", torch.empty(self.num_features))
        self.register_buffer("filled_gradient", torch.zeros((), dtype=torch.int64))
        self.register_buffer("recent", torch.empty(REMEMBERED, 2 * self.num_features + 1), persistent=False)
        self._add_counters()
        self._add_loss_scale()

    def reset_running_stats(self) -> None:
        """Reset the running statistics."""
        self.running_square.fill_(1)
        self.window_square.fill_(1)
        self.recent.fill_(-1)  # no second moment is negative: nothing is remembered
        self._reset_counters()
        self.reset_warmup()

    def reset_warmup(self) -> None:
        """Start the warm-up again, for example to fine-tune: reset steps and windows, but not what eval mode uses."""
        self.step.zero_()
        self.progress[2] = 0
        self.window_gradient.zero_()
        self.average_gradient.zero_()
        self.filled_gradient.zero_()

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalise; in training mode also update the statistics."""
        rows, valid = self.rows_of(x, mask)
        if not self.training:
            return self.like_input(self.eval_affine(rows, None, self.running_square, self.weight, self.bias, None), x)
        moments = self.moments(rows, valid, center=False)
        warmup = self.warmup_steps if max(self.windows) > 1 else NEVER
        with torch.no_grad():
            divisor, gate = smooth_square_(
                moments.square, moments.rows, self.window_square, self.running_square, self.recent, self.step,
                self.skips, self.progress, warmup, self.patience, self.momentum, self.eps,
                self.filtration is not None, self.counts_steps,
            )  # fmt: skip
            rstd = torch.rsqrt(divisor + self.eps)
        psi = Psi(
            "smooth", self.momentum, self.loss_scale, gate, self.average_gradient, self.window_gradient,
            self.filled_gradient,
        )  # fmt: skip
        y = normalize(rows, valid, self.weight, self.bias, None, moments, rstd, self.sync, psi)
        return self.like_input(y, x)

    def frozen_affine(self) -> tuple[Tensor, Tensor | None]:
        """Return scale and shift of eval mode, in the buffers' precision."""
        rstd = torch.rsqrt(self.running_square + self.eps)
        return channel_affine(self.weight, self.bias, None, None, rstd)

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Return the mean square."""
        return (self.running_square,)

    @classmethod
    def defaults_after(cls, layer: NormLayer) -> dict[str, Any]:
        """Have a bias if the norm has one."""
        return {"bias": layer.bias is not None}

    def extra_repr(self) -> str:
        """Return the arguments; some only if they differ from their default."""
        window = self.windows[0] if self.windows[0] == self.windows[1] else self.windows
        options = "" if self.bias is not None else ", bias=False"
        return (
            f"{self.num_features}, window={window}, warmup_steps={self.warmup_steps}, filtration={self.filtration!r}, "
            f"patience={self.patience}, momentum={self.momentum}, eps={self.eps}{options}{self._common_repr()}"
        )


register_norm(UnifiedNorm, "batch", channel_dim="channel_dim")
TARGETS["unified"] = UnifiedNorm
