"""What the norms of this package share: rows and masks, statistics over ranks, one autograd function, fp32 buffers.

In training each of them is y = (x - mean) rstd weight + eta x + bias, per channel, and they differ in where `mean` and
`rstd` come from and in what their backward puts for mean(dz z). The autograd function saves no buffer: two forwards
before one backward, and a module used twice, are ordinary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._models.masks import mask_for
from stabnorm._models.ranks import gather_over_ranks
from stabnorm.errors import StabNormError
from stabnorm.functional import BatchMoments, channel_affine, merge_batches
from stabnorm.norms.rows import as_rows
from stabnorm.ops.rows import LOW_PRECISION, affine_of_rows, gradient_of_rows, moments_of_rows, sums_of_rows, widened
from stabnorm.ops.running import quadratic_gradient_, smooth_gradient_

UNSAVED = {"recent": -1.0, "loss_scale": 1.0}  # -1 is no second moment: no forward is remembered


class Float32Buffers(nn.Module):
    """Floating buffers stay float32 under `.to(torch.bfloat16)` and `.half()`: a running mean needs its digits."""

    def _own_buffers(self) -> dict[str, Tensor | None]:
        return self._buffers

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As `nn.Module` does; also where `torch.set_default_dtype` made it low in precision."""
        low = tensor is not None and tensor.dtype in LOW_PRECISION
        super().register_buffer(name, tensor.float() if low else tensor, persistent)  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: buffer for name, buffer in self._own_buffers().items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype in LOW_PRECISION and before.dtype not in LOW_PRECISION:
                self._buffers[name] = before.to(after.device)
        return self


class ChannelNorm(Float32Buffers):
    """Base of the norms over one channel axis.

    Args:
        num_features: C.
        eps: added to the variance.
        channel_dim: the axis of the input that holds the channels.
        sync: merge the statistics over the ranks of `torch.distributed`.

    Raises:
        ValueError: `num_features` < 1 or `channel_dim` is 0, the batch.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    step: Tensor
    skips: Tensor
    progress: Tensor
    loss_scale: Tensor

    def __init__(self, num_features: int, eps: float, channel_dim: int, sync: bool) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features={num_features} is no number of channels. Give the size of the channel axis")
        if channel_dim == 0:
            raise ValueError("channel_dim=0 is the batch. Give the axis that holds the channels, usually -1 or 1")
        self.num_features, self.eps, self.channel_dim, self.sync = num_features, eps, channel_dim, sync
        self.counts_steps = True  # False: whoever drives the training writes `step`

    def _add_counters(self) -> None:
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skips", torch.zeros((), dtype=torch.int64))
        self.register_buffer("progress", torch.zeros(3, dtype=torch.int64))  # see ops/running.py

    def _add_loss_scale(self) -> None:
        # Running gradient statistics are kept in units of the unscaled loss. Whoever scales the loss writes the scale.
        self.register_buffer("loss_scale", torch.ones(()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        was_meta = self.weight.is_meta
        super()._apply(fn, recurse)
        if was_meta:
            self._begin_unsaved()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        was_meta = self.weight.is_meta
        super()._load_from_state_dict(*args)
        if was_meta:
            self._begin_unsaved()

    def _begin_unsaved(self) -> None:
        """Off the meta device, give the buffers that no checkpoint holds their first values."""
        for name, value in UNSAVED.items():
            buffer = self._buffers.get(name)
            if buffer is not None:
                self._buffers[name] = torch.full_like(buffer, value, device=self.weight.device)

    def _reset_counters(self) -> None:
        self.step.zero_()
        self.skips.zero_()
        self.progress.zero_()

    def rows_of(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The input as ``[R, C]`` and which rows count, ``[R]`` bool or None.

        Raises:
            TypeError: the input is not floating, or the mask not bool.
            ValueError: the input has another number of channels, or the mask another shape.
        """
        name = type(self).__name__
        if x.is_nested:
            raise TypeError(
                f"{name} reads plain tensors, and this one is nested. nn.TransformerEncoder nests padded batches in "
                "eval: set its use_nested_tensor = False, or build it with enable_nested_tensor=False"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name} normalises floating point input, and this is {x.dtype}. Use x.float()")
        axis = self.channel_dim % x.ndim if -x.ndim <= self.channel_dim < x.ndim else None
        if axis is None or x.shape[axis] != self.num_features:
            raise ValueError(
                f"{name} has num_features={self.num_features} on axis {self.channel_dim}, but its input has the shape "
                f"{tuple(x.shape)}. Build it with the number of channels the input has, or set channel_dim="
            )
        rows = as_rows(x, self.channel_dim)
        tokens = x.shape[:axis] + x.shape[axis + 1 :]
        if mask is None:
            mask = mask_for(tokens, name)
        elif mask.dtype != torch.bool:
            raise TypeError(f"the mask of {name} is bool, True = valid token; got {mask.dtype}. Use mask.bool()")
        elif mask.shape != tokens:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, but the input {tuple(x.shape)} of {name} has tokens of shape "
                f"{tuple(tokens)}. A mask has the input's shape without the channel axis"
            )
        return rows, None if mask is None else mask.reshape(-1)

    def like_input(self, rows: Tensor, x: Tensor) -> Tensor:
        """``rows [R, C]`` in the shape of x, and contiguous where x is."""
        if self.channel_dim in (-1, x.ndim - 1):
            return rows.reshape(x.shape)
        y = rows.reshape(x.movedim(self.channel_dim, -1).shape).movedim(-1, self.channel_dim)
        return y.contiguous() if x.is_contiguous() else y

    @torch.no_grad()
    def moments(self, rows: Tensor, valid: Tensor | None, *, center: bool) -> BatchMoments:
        """The batch's moments, of all ranks' batches where `sync` is on."""
        found = moments_of_rows(rows, valid, center=center)
        if not self.sync:
            return found
        packed = torch.cat([part.reshape(-1) for part in found if part is not None])
        everyone = gather_over_ranks(packed)
        means, squares = (everyone[:, 1:].chunk(2, 1)) if center else (None, everyone[:, 1:])
        return merge_batches(everyone[:, 0], means, squares)

    def eval_affine(
        self,
        rows: Tensor,
        mean: Tensor | None,
        square: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eta: Tensor | None,
    ) -> Tensor:
        """``rows`` with fixed statistics, differentiable in rows and parameters."""
        wide = widened(rows)
        rstd = torch.rsqrt(square.to(wide.dtype) + self.eps)
        scale, shift = channel_affine(weight, bias, eta, mean, rstd)
        y = wide * scale if shift is None else torch.addcmul(shift, wide, scale)
        return y.to(rows.dtype)

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """What the norm is in eval: ``(scale, shift, channel_dim)``, y = scale x + shift per channel, in float64."""
        raise NotImplementedError

    def _folded(
        self, mean: Tensor | None, square: Tensor, bias: Tensor | None, eta: Tensor | None
    ) -> tuple[Tensor, Tensor, int]:
        if not all(torch.isfinite(t).all() for t in (mean, square) if t is not None):
            raise StabNormError(
                f"{type(self).__name__} holds non-finite running statistics, so it has no affine map. Gather them anew"
            )
        bias, eta, mean = (None if t is None else t.detach().double() for t in (bias, eta, mean))
        rstd = torch.rsqrt(square.detach().double() + self.eps)
        scale, shift = channel_affine(self.weight.detach().double(), bias, eta, mean, rstd)
        return scale, torch.zeros_like(scale) if shift is None else shift, self.channel_dim

    def _common_repr(self) -> str:
        options = "" if self.channel_dim == -1 else f", channel_dim={self.channel_dim}"
        return options + (", sync=True" if self.sync else "")


def refuse_second_derivative() -> None:
    """Raise StabNormError in a backward with `create_graph=True`.

    The statistics are constants to these functions and the gradient's state moves, so that a second derivative would be
    wrong without a sign. `once_differentiable` says so only where the upstream gradient requires a gradient, too.
    """
    if torch.is_grad_enabled():
        raise StabNormError(
            "the norms of stabnorm have no second derivative in training mode. Take the gradient without create_graph, "
            "or call eval() on them first"
        )


_Maybe = Tensor | None
Psi = tuple[str, float, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe]
EXACT: Psi = ("exact", 0.0, None, None, None, None, None, None)


def normalize(
    rows: Tensor,
    valid: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eta: Tensor | None,
    moments: BatchMoments,
    rstd: Tensor,
    sync: bool,
    psi: Psi = EXACT,
) -> Tensor:
    """Y ``[R, C]`` with the statistics of this batch, or what stands for them, and their gradient.

    Args:
        rows: ``[R, C]``.
        valid: ``[R]`` bool or None.
        weight: ``[C]``.
        bias: ``[C]`` or None.
        eta: ``[1]`` or None.
        moments: the batch's; `mean` decides whether x is centred, `rows` is what the gradient's means divide by.
        rstd: ``[C]``, what x is multiplied with.
        sync: add the backward's sums over ranks.
        psi: what the backward puts for mean(dz z): ("exact", ...), or ("smooth", momentum, loss scale, gate, window,
            average, filled, None), or ("quadratic", alpha, loss scale, gate, nu, None, None, mean(z^2)).
    """
    arguments = (rows, weight, bias, eta, moments.mean, rstd, moments.rows, valid, sync, *psi)
    return _Normalize.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


class _Normalize(torch.autograd.Function):
    r"""y = (x - mean) rstd weight + eta x + bias, with z = (x - mean) rstd and dz = weight dy.

    .. math:: dx = (dz - \psi z - \overline{dz})\, rstd + \eta\, dy

    (the mean only where x is centred); psi = mean(dz z) is the exact gradient when rstd is the batch's own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eta: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        count: Tensor,
        valid: Tensor | None,
        sync: bool,
        rule: str,
        decay: float,
        loss_scale: Tensor | None,
        gate: Tensor | None,
        first: Tensor | None,
        second: Tensor | None,
        third: Tensor | None,
        power: Tensor | None,
    ) -> Tensor:
        scale, shift = channel_affine(weight, bias, eta, mean, rstd)
        ctx.save_for_backward(rows, weight, bias, eta, mean, rstd, count, valid, scale, gate, power)
        ctx.loss_scale = loss_scale
        ctx.sync, ctx.rule, ctx.decay = sync, rule, decay
        ctx.first, ctx.second, ctx.third = first, second, third  # buffers: changed by other batches, so never saved
        return affine_of_rows(rows, scale, shift)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        rows, weight, bias, eta, mean, rstd, count, valid, scale, gate, power = ctx.saved_tensors
        plain, weighted, plain_valid, weighted_valid = sums_of_rows(grad_y, rows, mean, valid)
        if ctx.sync:
            sums = gather_over_ranks(torch.cat([plain_valid, weighted_valid])).sum(0)
            plain_valid, weighted_valid = sums.chunk(2)
        size = count.clamp(min=1)
        gain = weight.to(scale.dtype)
        psi = gain * weighted_valid * rstd / size
        if ctx.rule == "smooth":
            state = ctx.first, ctx.second, ctx.third
            psi = smooth_gradient_(psi / ctx.loss_scale, gate, *state, ctx.decay) * ctx.loss_scale
        elif ctx.rule == "quadratic":
            psi = quadratic_gradient_(psi / ctx.loss_scale, power, gate, ctx.first, ctx.decay) * ctx.loss_scale
        offset = None if mean is None else gain * plain_valid * rstd / size
        dx = gradient_of_rows(grad_y, rows, mean, valid, scale, psi * rstd * rstd, offset)
        d_weight = (weighted * rstd).to(weight.dtype)
        d_bias = None if bias is None else plain.to(bias.dtype)
        d_eta = None
        if eta is not None:
            through = weighted if mean is None else weighted + mean * plain
            d_eta = through.sum().reshape(eta.shape).to(eta.dtype)
        return dx, d_weight, d_bias, d_eta, *[None] * 13
