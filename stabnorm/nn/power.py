"""PowerNorm: a running quadratic mean in the forward, a running gradient statistic in the backward."""

from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._checks import check_count, check_number
from stabnorm.errors import StabNormError
from stabnorm.functional import channel_affine, scale_groups
from stabnorm.nn._base import TARGETS
from stabnorm.nn._channel_norm import ChannelNorm, running_values
from stabnorm.nn._normalize import Psi, normalize
from stabnorm.nn._one_pass import OnePass
from stabnorm.norms import register_norm
from stabnorm.ops.groups import gradient_of_groups, scaled_groups
from stabnorm.ops.one_pass import saves_a_read
from stabnorm.ops.rows import widened
from stabnorm.ops.running import REMEMBERED, track_quadratic_


class PowerNorm(ChannelNorm):
    r"""PowerNorm over the last dimension (arXiv:2003.07845, algorithm 2), affine in eval unless `groups` is set.

    .. math:: \hat x = x / \psi,\quad y = \gamma \hat x + \beta,\quad dx = (d\hat x - \nu \hat x) / \psi

    .. math:: \psi^2 \leftarrow \alpha \psi^2 + (1 - \alpha)\, \overline{x^2},\qquad
              \nu \leftarrow \nu (1 - (1 - \alpha_b) \Gamma) + (1 - \alpha_b) \Lambda

    .. math:: \Gamma = \overline{\hat x^2},\qquad \Lambda = \overline{d\hat x\, \hat x}

    Forward and backward use the same psi; the backward of the published code divides by the statistic of the batch.
    During the warm-up psi is the statistic of the batch, the gradient is exact, and the running psi^2 is the plain mean
    over all batches so far. A batch with a value that is not finite, or without a valid token, does not change any
    state.

    Args:
        num_features: number of channels, C.
        groups: number of groups of channels. Each token is first divided by the rms of its own group (GroupScaling in
            the published code, which the paper's algorithm does not have). Then the norm is not affine in eval, and
            does not fold. Default: None, no GroupScaling.
        warmup_steps: number of steps with the batch's own statistics. Default: 10000.
        alpha_fwd: share of the old value in psi^2. Default: 0.9.
        alpha_bkw: share of the old value in nu. Default: 0.9.
        eps: added to mean squares. Default: 1e-5.
        channel_dim: axis of the input that holds the channels. Default: -1.
        sync: merge statistics over ranks. Default: False.
        variant: "official" runs the published code, see `stabnorm.nn.official`. Default: "corrected".

    Shape:
        ``[..., C]`` to the same shape, with C on the axis `channel_dim`. `mask` has the shape without that axis.

    Raises:
        ValueError: an argument is out of range.

    >>> norm = PowerNorm(8, warmup_steps=1)
    >>> x = torch.randn(4, 6, 8)
    >>> bool(norm(x).square().mean((0, 1)).sub(1).abs().max() < 1e-3)
    True
    >>> PowerNorm(8, groups=2).fold_affine()
    Traceback (most recent call last):
    stabnorm.errors.StabNormError: PowerNorm with groups=2 divides every token by its own rms, so it is no affine map...
    """

    running_square: Tensor
    nu: Tensor
    recent: Tensor
    bias: nn.Parameter

    def __init__(
        self,
        num_features: int,
        groups: int | None = None,
        warmup_steps: int = 10000,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        eps: float = 1e-5,
        *,
        channel_dim: int = -1,
        sync: bool = False,
        variant: str = "corrected",
    ) -> None:
        del variant  # it has chosen the class
        super().__init__(num_features, eps, channel_dim, sync)
        if groups is not None:
            check_count("groups", groups, hint=", or None")
        if groups is not None and num_features % groups:
            raise ValueError(f"groups={groups} does not divide num_features={num_features}. Give a divisor, or None")
        check_count("warmup_steps", warmup_steps, 0)
        check_number("alpha_fwd", alpha_fwd, least=0, most=1)
        check_number("alpha_bkw", alpha_bkw, least=0, most=1)
        self.groups, self.warmup_steps = groups, warmup_steps
        self.alpha_fwd, self.alpha_bkw = alpha_fwd, alpha_bkw
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self._add_state()
        self.reset_parameters()

    def _add_state(self) -> None:
        self.register_buffer("running_square", torch.empty(self.num_features))
        self.register_buffer("nu", torch.empty(self.num_features))
        self.register_buffer("recent", torch.empty(REMEMBERED, 2 * self.num_features + 1), persistent=False)
        self._add_counters()
        self._add_loss_scale()

    def reset_running_stats(self) -> None:
        """Reset the running statistics."""
        self.running_square.fill_(1)
        self.nu.zero_()
        self.recent.fill_(-1)
        self._reset_counters()

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalise; in training mode also update the statistics."""
        rows, valid = self.rows_of(x, mask)
        if self.groups is not None:
            rows = self.scaled(rows, masked=valid is not None)
        if not self.training:
            return self.like_input(self.eval_affine(rows, None, self.running_square, self.weight, self.bias, None), x)
        if not self.sync and saves_a_read(rows, valid):
            y = OnePass.apply(  # type: ignore[no-untyped-call]
                rows, self.weight, self.bias, valid, self.running_square, self.recent, self.step, self.skips,
                self.progress, self.nu, self.loss_scale, self.warmup_steps, (self.alpha_fwd, self.alpha_bkw), self.eps,
                self.counts_steps,
            )  # fmt: skip
            return self.like_input(y, x)
        moments = self.moments(rows, valid, center=False)
        with torch.no_grad():
            divisor, gate = track_quadratic_(
                moments.square, moments.rows, self.running_square, self.recent, self.step, self.skips, self.progress,
                self.warmup_steps, self.alpha_fwd, self.counts_steps,
            )  # fmt: skip
            rstd = torch.rsqrt(divisor + self.eps)
            power = moments.square * rstd * rstd
        psi = Psi("quadratic", self.alpha_bkw, self.loss_scale, gate, average=self.nu, power=power)
        y = normalize(rows, valid, self.weight, self.bias, None, moments, rstd, self.sync, psi)
        return self.like_input(y, x)

    def frozen_affine(self) -> tuple[Tensor, Tensor | None]:
        """Return scale and shift of eval mode, in the buffers' precision."""
        rstd = torch.rsqrt(self.running_square + self.eps)
        return channel_affine(self.weight, self.bias, None, None, rstd)

    def scaled(self, rows: Tensor, *, masked: bool = False) -> Tensor:
        """Divide each group of channels of each token by its rms (GroupScaling)."""
        assert self.groups is not None
        if not self.training:  # the formula supports second derivatives and torch.func
            return scale_groups(widened(rows), self.groups, self.eps).to(rows.dtype)
        scaled: Tensor = _GroupScaling.apply(rows, self.groups, self.eps, masked)  # type: ignore[no-untyped-call]
        return scaled

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Return the mean square; with groups, that of the scaled input."""
        return (self.running_square,)

    @torch.no_grad()
    def batch_statistics(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the same statistics of one batch; see the base class."""
        rows, valid = self.rows_of(x, mask)
        return running_values(self.moments(rows if self.groups is None else self.scaled(rows), valid, center=False))

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Return the affine map of eval mode; raise StabNormError if the norm has groups."""
        if self.groups is not None:
            raise not_affine(self.groups)
        return super().fold_affine()

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Raise the error of the constructor if an option is out of range, whatever the number of channels."""
        groups = options.get("groups")
        cls(max(groups, 1) if isinstance(groups, int) else 1, **options)

    def extra_repr(self) -> str:
        """Return the arguments; some only if they differ from their default."""
        return (
            f"{self.num_features}, groups={self.groups}, warmup_steps={self.warmup_steps}, alpha_fwd={self.alpha_fwd}, "
            f"alpha_bkw={self.alpha_bkw}, eps={self.eps}{self._common_repr()}"
        )


def not_affine(groups: int) -> StabNormError:
    """Return the error that says why a PowerNorm with groups is not affine."""
    return StabNormError(
        f"PowerNorm with groups={groups} divides every token by its own rms, so it is no affine map in eval and does "
        "not fold. Build it with groups=None"
    )


class _GroupScaling(torch.autograd.Function):
    """`functional.scale_groups` with an explicit gradient; autograd of the formula would take twice as many passes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: int, eps: float, masked: bool) -> Tensor:
        y, r = scaled_groups(rows, groups, eps)
        ctx.save_for_backward(y, r)
        ctx.masked = masked
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        y, r = ctx.saved_tensors
        return gradient_of_groups(grad_y, y, r, ctx.masked), None, None, None


register_norm(PowerNorm, "batch", channel_dim="channel_dim")
TARGETS["power"] = PowerNorm
