r"""The published modules: UN, PowerNorm, RepBN and PRepBN as their authors' code computes them, at its speed.

They reproduce recorded results step by step; `tests/golden` holds the recordings. For training, use the modules of
`stabnorm.nn`, which compute what the papers describe. These faults are reproduced on purpose. Our tests and notes refer
to them by these numbers:

* UN: D2 (the filter's threshold pools the variance of all channels), D4 to D6 (a filtered batch still enters the
  running statistics, and a running statistic takes its place in the window), D7 (the warm-up gradient uses a running
  mean that starts at 0), D8 and D9 (a ratio r in the backward only, from step 1001 on), D10 (padding counts in the
  gradient's mean, not in the forward's), D12 (a dead channel has the geometric mean 0), D15 (a resumed counter means
  no second warm-up), D16 (a window of one is plain batch statistics).
* PowerNorm: C2 (the backward divides by the batch's statistic, the forward by the running one), C3 (two updates of the
  running statistic per warm-up step), C4 (GroupScaling normalises every token as well: nothing to fold).
* PRepBN: P5 (padding leaves RepBN as (1 + eta) x), P7 (eval is RepBN whatever lam is), P8 (the schedule counts
  forwards); the warm steps do not run RepBN, so that its statistics start after them.
* All: D13, C5, P9 (statistics of one rank, a host sync per step) and D14 (statistics in the input's precision). Not
  reproduced: that two forwards before one backward fail with "modified by an inplace operation".

Arguments carry our names, and `momentum` is PyTorch's, the weight of the new value: 0.1 where the papers keep 0.9.
Parameters and buffers carry the published names, so that a published checkpoint loads. Input is ``[B, N, C]``, mask
``[B, N]`` with True for a valid token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm.nn._normalize import refuse_second_derivative

Correction = Callable[[Tensor, Tensor], Tensor]  # (dz, z) -> dz - psi z; updates what psi comes from


def _mean(t: Tensor) -> Tensor:
    """Return the mean of ``[B, C, N]`` over tokens and batch."""
    return t.mean(2).mean(0)


def _channels_first(x: Tensor) -> Tensor:
    """Copy ``[B, N, C]`` to ``[B, C, N]``, the layout of the published modules; such copies are most of their cost."""
    return x.transpose(1, 2).contiguous()


def _channels_last(y: Tensor) -> Tensor:
    return y.transpose(1, 2).contiguous()


def _second_moment(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean square per channel of ``[B, C, N]``; with a mask, over the valid tokens only."""
    return _mean(x * x) if mask is None else x.transpose(1, 2)[mask].square().mean(0)


def _average_(running: Tensor, new: Tensor, weight: float) -> None:
    """Update the running average with `new`, in place; the two may differ in dtype."""
    running.mul_(1 - weight).add_(new, alpha=weight)


def _affine(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return z * weight[:, None] + bias[:, None]


class _RunningGradientScale(torch.autograd.Function):
    r"""y = weight z + bias with z = x scale; the backward takes mean(dz z) from a running statistic psi.

    .. math:: dz = r \gamma\, dy,\quad dx = (dz - \psi z)\, s_b,\quad d\gamma = \sum r z\, dy,\quad d\beta = \sum dy
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        backward_scale: Tensor,
        ratio: Tensor,
        correction: Correction,
    ) -> Tensor:
        z = x * scale[:, None]
        ctx.save_for_backward(z, weight, backward_scale, ratio)
        ctx.correction = correction
        return _affine(z, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        z, weight, backward_scale, ratio = ctx.saved_tensors
        grad_z = grad_y * (weight * ratio)[:, None]
        grad_x = ctx.correction(grad_z, z) * backward_scale[:, None]
        grad_weight = (grad_y * ratio[:, None] * z).sum((0, 2))
        return grad_x, grad_weight, grad_y.sum((0, 2)), None, None, None, None


class OfficialUnifiedNorm(nn.Module):
    """The published UN (UN1d).

    Args:
        num_features: C, the number of channels.
        window: batches in the moving averages; a pair for (forward, backward).
        warmup_steps: forwards that use the batch's own statistics.
        filtration: whether outlier batches are normalised without the moving averages.
        momentum: weight of the new value in the running statistics.
        eps: added to the second moment.

    Shape:
        ``[B, N, C]`` to the same.

    >>> OfficialUnifiedNorm(8, window=(2, 8))(torch.randn(4, 6, 8)).shape
    torch.Size([4, 6, 8])
    """

    running_var: Tensor
    ema_gz: Tensor
    iters: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    skip_counter: Tensor

    def __init__(
        self,
        num_features: int,
        window: int | tuple[int, int] = 4,
        warmup_steps: int = 4000,
        filtration: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.window = (window, window) if isinstance(window, int) else window
        self.warmup_steps = warmup_steps
        self.filtration = filtration
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("ema_gz", torch.zeros(num_features))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("buffer_x2", torch.zeros(self.window[0], num_features))
        self.register_buffer("buffer_gz", torch.zeros(self.window[1], num_features))
        self.register_buffer("skip_counter", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; in training mode this is a step."""
        x = _channels_first(x)
        if not self.training:
            z = x * torch.rsqrt(self.running_var + self.eps)[:, None]
            return _channels_last(_affine(z, self.weight, self.bias))
        var, ratio, correction = self._step(_second_moment(x.detach(), mask))
        scale = torch.rsqrt(var + self.eps)
        y: Tensor = _RunningGradientScale.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, scale, scale, ratio, correction
        )
        return _channels_last(y)

    def _step(self, x2: Tensor) -> tuple[Tensor, Tensor, Correction]:
        """Add the batch's second moment; return the variance to divide by, the ratio r, and the backward's rule."""
        self.iters += 1
        step, size = int(self.iters), self.window[0]
        warm = step < self.warmup_steps
        recorded_var = self.buffer_x2.sqrt().var()  # over window and channels at once, of the window before (D2)
        self.buffer_x2[step % size] = x2
        geometric = self.buffer_x2.log().mean(0).exp()
        skip = size == 1  # D16
        if self.filtration and not warm:
            gap = self.buffer_x2.mean(0) - geometric
            skip = skip or bool((gap > size * recorded_var).any())
        if skip:
            self.buffer_x2[step % size] = self.running_var  # D6
            self.skip_counter += 1
        var = x2 if skip or warm or step <= size else geometric
        ratio = torch.ones_like(var)
        if not skip and step > max(1000, self.warmup_steps):  # D9
            ratio = ((var + self.eps) / (self.running_var + self.eps)).sqrt().clamp(1 / 5, 5)
        _average_(self.running_var, var, self.momentum)  # also with a filtered batch (D4)
        return var, ratio, lambda dz, z: self._correct(dz, z, step, skip)

    def _correct(self, dz: Tensor, z: Tensor, step: int, skip: bool) -> Tensor:
        """Add the batch's gradient statistic; return dz - psi z."""
        gz = _mean(dz * z)
        size = self.window[1]
        warm = step < self.warmup_steps or step <= size
        self.buffer_gz[step % size] = self.ema_gz if skip else gz
        mean = gz if skip or warm else self.buffer_gz.mean(0)
        _average_(self.ema_gz, mean, self.momentum)  # also with a filtered batch (D5)
        psi = gz if skip else self.ema_gz  # in warm-up too (D7)
        return dz - psi[:, None] * z

    def extra_repr(self) -> str:
        """Arguments as given."""
        return (
            f"{self.num_features}, window={self.window}, warmup_steps={self.warmup_steps}, "
            f"filtration={self.filtration}, momentum={self.momentum}, eps={self.eps}"
        )


class OfficialPowerNorm(nn.Module):
    """The published PowerNorm (MaskPowerNorm).

    Args:
        num_features: C, the number of channels.
        groups: number of groups of channels, a divisor of C; each token is first divided by the rms of its own group.
        warmup_steps: forwards that use the batch's own statistics.
        alpha_fwd: share of the old value in the running quadratic mean.
        alpha_bkw: the same in the backward.
        eps: added to every mean square.

    Shape:
        ``[B, N, C]`` to the same.

    >>> OfficialPowerNorm(8, groups=2)(torch.randn(4, 6, 8)).shape
    torch.Size([4, 6, 8])
    """

    running_phi: Tensor
    ema_gz: Tensor
    iters: Tensor

    def __init__(
        self,
        num_features: int,
        groups: int = 1,
        warmup_steps: int = 10000,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.groups = groups
        self.warmup_steps = warmup_steps
        self.alpha_fwd = alpha_fwd
        self.alpha_bkw = alpha_bkw
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_phi", torch.ones(1, num_features, 1, 1))
        self.register_buffer("ema_gz", torch.zeros(1, num_features, 1, 1))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; in training mode this is a step."""
        grouped = x.unflatten(-1, (self.groups, -1))
        scaled = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        x = _channels_first(scaled.flatten(-2))
        phi = self.running_phi.flatten()
        if not self.training:
            z = x * torch.rsqrt(phi + self.eps)[:, None]
            return _channels_last(_affine(z, self.weight, self.bias))
        x2 = _second_moment(x.detach(), mask)
        batch_scale = torch.rsqrt(x2 + self.eps)
        self.iters += 1
        step = int(self.iters)
        scale = batch_scale if step <= self.warmup_steps else torch.rsqrt(phi + self.eps)
        if step < self.warmup_steps:  # one step less than the line above, as recorded
            _average_(phi, x2, 1 / step)
        _average_(phi, x2, 1 - self.alpha_fwd)  # a second time in warm-up (C3)
        ratio = torch.ones_like(x2)
        y: Tensor = _RunningGradientScale.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, scale, batch_scale, ratio, self._correct
        )
        return _channels_last(y)

    def _correct(self, dz: Tensor, z: Tensor) -> Tensor:
        """Return dz - psi z, and add the mean of its product with z to the running statistic."""
        ema = self.ema_gz.flatten()
        corrected = dz - (1 - self.alpha_bkw) * ema[:, None] * z
        ema += _mean(corrected * z)
        return corrected

    def extra_repr(self) -> str:
        """Arguments as given."""
        return (
            f"{self.num_features}, groups={self.groups}, warmup_steps={self.warmup_steps}, "
            f"alpha_fwd={self.alpha_fwd}, alpha_bkw={self.alpha_bkw}, eps={self.eps}"
        )


class OfficialRepBN(nn.Module):
    """The published RepBN: BN(x) + eta x, with eta called `alpha`.

    Args:
        num_features: C, the number of channels.
        eps: BatchNorm's.
        momentum: BatchNorm's, the weight of the new value.

    Shape:
        ``[B, N, C]`` to the same.

    >>> OfficialRepBN(8)(torch.randn(4, 6, 8)).shape
    torch.Size([4, 6, 8])
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = nn.BatchNorm1d(num_features, eps, momentum)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """BN(x) + eta x; padding becomes (1 + eta) x (P5)."""
        if mask is None:
            x = x.transpose(1, 2)
            y: Tensor = self.bn(x) + self.alpha * x
            return y.transpose(1, 2)
        normalized = x.clone()
        normalized[mask] = self.bn(x[mask])
        return normalized + self.alpha * x


class OfficialPRepBN(nn.Module):
    """The published PRepBN (LinearNorm): lam LN(x) + (1 - lam) RepBN(x), and RepBN alone in eval (P7).

    Args:
        num_features: C, the number of channels.
        total_steps: training forwards in which lam falls from 1 to 0.
        warmup_steps: training forwards before that which run LayerNorm only.
        eps: of both norms.
        momentum: BatchNorm's, the weight of the new value.

    Shape:
        ``[B, N, C]`` to the same.

    >>> norm = OfficialPRepBN(8, total_steps=4)
    >>> [(norm.lam, norm(torch.randn(4, 6, 8)).shape[-1])[0] for _ in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    warm: Tensor
    iter: Tensor
    total_step: Tensor

    def __init__(
        self,
        num_features: int,
        total_steps: int = 300_000,
        warmup_steps: int = 0,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(num_features, eps)
        self.norm2 = OfficialRepBN(num_features, eps, momentum)
        self.register_buffer("warm", torch.tensor(warmup_steps))
        self.register_buffer("iter", torch.tensor(total_steps))
        self.register_buffer("total_step", torch.tensor(total_steps))

    @property
    def lam(self) -> float:
        """The share of LayerNorm in the next training forward."""
        return 1.0 if self.warm > 0 else int(self.iter) / int(self.total_step)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; in training mode this is a step of the schedule (P8)."""
        y: Tensor
        if not self.training:
            y = self.norm2(x, mask)
        elif self.warm > 0:
            self.warm -= 1
            y = self.norm1(x)
        else:
            lam = self.lam
            self.iter.sub_(1).clamp_(min=0)
            y = lam * self.norm1(x) + (1 - lam) * self.norm2(x, mask)
        return y

    def extra_repr(self) -> str:
        """Return the state of the schedule."""
        return f"warm={int(self.warm)}, iter={int(self.iter)}, total_steps={int(self.total_step)}"
