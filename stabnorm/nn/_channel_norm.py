"""The base of the norms over one channel axis: rows and masks, statistics over ranks, eval mode, and conversion."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from stabnorm._checks import check_axis, check_choice, check_count, check_flag, check_number, shown
from stabnorm._models.devices import floating_tensor_of
from stabnorm._models.masks import mask_for
from stabnorm._models.ranks import gather_over_ranks
from stabnorm.errors import StabNormError
from stabnorm.functional import BatchMoments, channel_affine, merge_batches
from stabnorm.nn._base import Conversion, EvalAffineNorm, one_node, take_flags, tensors_like, warn_of_partial_checkpoint
from stabnorm.norms import NormLayer
from stabnorm.norms.rows import as_rows, from_rows
from stabnorm.ops.rows import moments_of_rows, widened

UNSAVED = {"recent": -1.0, "loss_scale": 1.0}  # first values; -1 is no second moment, so no forward is remembered

UNKNOWN_WIDTH = 2  # a place-holder until the first call


class ChannelNorm(EvalAffineNorm):
    """Base of the norms over one channel axis.

    With ``variant="..."`` the constructor builds the subclass whose class statement has the same argument.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        channel_dim: the axis of the input that holds the channels.
        sync: merge the statistics over the ranks of `torch.distributed`.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range, or the class has no such `variant`.
    """

    variant: ClassVar[str] = "corrected"
    center: bool = False  # whether the batch's mean is a statistic, too
    weight: nn.Parameter
    bias: nn.Parameter | None
    step: Tensor
    skips: Tensor
    progress: Tensor
    loss_scale: Tensor

    def __init_subclass__(cls, variant: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.variant = variant or cls.variant

    def __new__(cls, *args: Any, variant: str | None = None, **options: Any) -> Any:
        """Create an instance of the class that `variant` names; None, as for a copy, means this class."""
        made = next((c for c in (cls, *cls.__subclasses__()) if variant is None or str(variant) == c.variant), None)
        if made is None:
            check_variant(variant)
            raise ValueError(f"{cls.__name__} has no variant={variant!r}. Leave it out")
        return super().__new__(made)

    def __init__(self, num_features: int, eps: float, channel_dim: int, sync: bool) -> None:
        super().__init__()
        check_count("num_features", num_features, hint=", the size of the channel axis")
        check_number("eps", eps, least=0)
        check_axis("channel_dim", channel_dim)
        check_flag("sync", sync)
        self.num_features, self.eps, self.channel_dim, self.sync = num_features, eps, channel_dim, sync
        self.counts_steps = True  # False: the training loop writes `step`
        self.any_width = False  # True: the first input decides how many channels there are

    def _add_counters(self) -> None:
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skips", torch.zeros((), dtype=torch.int64))
        self.register_buffer("progress", torch.zeros(3, dtype=torch.int64))  # see ops/running.py

    def _add_loss_scale(self) -> None:
        # Running gradient statistics are in units of the unscaled loss. Code that scales the loss writes the scale
        # here.
        self.register_buffer("loss_scale", torch.ones(()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        was_meta = self.weight.is_meta
        if self.without_numbers and not was_meta:  # a loader has put one tensor after the other in place
            tensors = self._own_tensors()
            lacking = {name: tensor for name, tensor in tensors if tensor.is_meta}
            for name, tensor in lacking.items():  # a plain checkpoint does not have it
                empty = torch.empty_like(tensor, device=self.weight.device)
                if isinstance(tensor, nn.Parameter):
                    self._parameters[name] = nn.Parameter(empty, tensor.requires_grad)
                else:
                    self._buffers[name] = empty
            if lacking:
                self._fill_in({name for name, _ in tensors} - lacking.keys())
            self._fill_in_unsaved()
        super()._apply(fn, recurse)
        if self.without_numbers and was_meta and not self.weight.is_meta:  # to_empty() left what the memory held
            self._fill_in(set())
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        was_meta = self.weight.is_meta
        if self.any_width and prefix + "weight" in state_dict:
            self._take_width(state_dict[prefix + "weight"].numel())
        if not any(key.startswith(prefix) for key in state_dict):
            warn_of_partial_checkpoint(self, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if was_meta and not self.weight.is_meta:  # with assign=True
            self._fill_in_unsaved()

    def _fill_in_unsaved(self) -> None:
        """Give first values to the buffers that no checkpoint holds, because the others have theirs."""
        for name, value in UNSAVED.items():
            buffer = self._buffers.get(name)
            if buffer is not None:
                self._buffers[name] = torch.full_like(buffer, value, device=self.weight.device)
        self.without_numbers = False

    @torch.no_grad()
    def _fill_in(self, loaded: set[str]) -> None:
        kept = {name: tensor.clone() for name, tensor in self._own_tensors() if name in loaded}
        self.reset_parameters()
        for name, tensor in self._own_tensors():
            if name in kept:
                tensor.copy_(kept[name])
        if "loss_scale" in self._buffers:
            self.loss_scale.fill_(UNSAVED["loss_scale"])

    def _reset_counters(self) -> None:
        self.step.zero_()
        self.skips.zero_()
        self.progress.zero_()

    def reset_parameters(self) -> None:
        """Reset parameters, statistics and counters."""
        self.without_numbers = self.weight.is_meta
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Reset the running statistics."""
        raise NotImplementedError

    # -- a forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; in training mode also update the statistics."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.frozen(x)
        else:  # noqa: RET505  # TorchScript compiles no other branch
            return one_node(self, x, mask) if isinstance(x, Proxy) else self.compute(x, mask)

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Run `forward` on tensors."""
        raise NotImplementedError

    def frozen(self, x: Tensor) -> Tensor:
        """Run `forward` in eval mode, in operations that TorchScript compiles."""
        if self.training:
            raise RuntimeError("a norm of stabnorm that TorchScript has compiled runs in eval mode only: call eval()")
        scale, shift = self.frozen_affine()
        wide = x.float() if x.dtype == torch.bfloat16 or x.dtype == torch.float16 else x
        wide = wide.transpose(self.channel_dim, -1)
        y = wide * scale if shift is None else torch.addcmul(shift, wide, scale)
        return y.to(x.dtype).transpose(self.channel_dim, -1)

    def frozen_affine(self) -> tuple[Tensor, Tensor | None]:
        """Return scale and shift of eval mode, in the buffers' precision."""
        raise NotImplementedError

    def rows_of(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the input as rows ``[R, C]``, and which of them are valid, ``[R]`` bool or None for all.

        Raises:
            TypeError, ValueError: see `checked_mask`.
        """
        valid = self.checked_mask(x, mask)
        return as_rows(x, self.channel_dim), valid

    def checked_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Check input and mask, and return which tokens are valid, ``[R]`` bool or None for all.

        Raises:
            TypeError: the input is not floating, or the mask not bool.
            ValueError: the input has another number of channels, or the mask another shape.
        """
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} normalises a tensor x, got {shown(x)} of type {type(x).__name__}")
        if x.is_nested:
            raise TypeError(
                f"{name} reads plain tensors, and this one is nested. Pass a padded tensor and its mask. Where it "
                "comes from an nn.TransformerEncoder, which nests padded batches, set its use_nested_tensor = False"
            )
        if (
            self.training
            and not torch.compiler.is_compiling()
            and torch._C._functorch.maybe_current_level() is not None
        ):
            raise StabNormError(
                f"{name} in training mode updates its statistics, which a transform of torch.func (grad, vmap, jvp) "
                "does not allow. Call eval() on the model first, or use torch.autograd"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name} normalises floating point input, and x is {x.dtype}. Use x.float()")
        axis = self.channel_dim % x.ndim if -x.ndim <= self.channel_dim < x.ndim else None
        if self.any_width and axis is not None:
            self._take_width(x.shape[axis])
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # it would warn of a comparison
        if axis is None or (not traced and x.shape[axis] != self.num_features):
            raise ValueError(
                f"{name} has num_features={self.num_features} on axis {self.channel_dim}, but its input x has the "
                f"shape {tuple(x.shape)}. Build it with the number of channels the input has, or set channel_dim="
            )
        tokens = x.shape[:axis] + x.shape[axis + 1 :]
        if mask is None:
            mask = mask_for(tokens, name)
        elif not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"the mask of {name} is a bool tensor, True = valid token; got {given}. Use mask.bool()")
        elif mask.shape != tokens:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, but the input {tuple(x.shape)} of {name} has tokens of shape "
                f"{tuple(tokens)}. A mask has the input's shape without the channel axis"
            )
        return None if mask is None else mask.reshape(-1)

    def check_width(self) -> None:
        """Raise StabNormError if no call has told yet how many channels there are."""
        if self.any_width:
            raise StabNormError(
                f"{type(self).__name__} learns its number of channels from its first input: run a batch"
            )

    @torch.inference_mode(False)  # the first input may be that of a validation, and what is made here is trained
    def _take_width(self, width: int) -> None:
        """Start anew with another number of channels; the parameters stay the same objects."""
        self.any_width, before = False, self.num_features
        if width == before:
            return

        def resized(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or tensor.shape[-1] not in (before, 2 * before + 1) or not tensor.is_floating_point():
                return tensor
            last = width if tensor.shape[-1] == before else 2 * width + 1
            return tensor.new_empty(*tensor.shape[:-1], last)

        self.num_features = width
        for parameter in self.parameters(recurse=False):
            parameter.data = resized(parameter.data)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else resized(buffer)
        self.reset_parameters()

    def like_input(self, rows: Tensor, x: Tensor) -> Tensor:
        """Return ``rows [R, C]`` in the shape of x, contiguous if x is."""
        if self.channel_dim in (-1, x.ndim - 1):
            return rows.reshape(x.shape)
        y = from_rows(rows, x.shape, self.channel_dim)
        return y.contiguous() if x.is_contiguous() else y

    @torch.no_grad()
    def batch_statistics(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the same statistics of one batch; see the base class."""
        return running_values(self.moments(*self.rows_of(x, mask), center=self.center))

    @torch.no_grad()
    def moments(self, rows: Tensor, valid: Tensor | None, *, center: bool) -> BatchMoments:
        """Return the moments of the batch, or with `sync` of the batches of all ranks."""
        moments = moments_of_rows(rows, valid, center=center)
        if not self.sync:
            return moments
        packed = torch.cat([part.reshape(-1) for part in moments if part is not None])
        of_ranks = gather_over_ranks(packed)
        means, squares = (of_ranks[:, 1:].chunk(2, 1)) if center else (None, of_ranks[:, 1:])
        return merge_batches(of_ranks[:, 0], means, squares)

    def eval_affine(
        self, rows: Tensor, mean: Tensor | None, square: Tensor, weight: Tensor, bias: Tensor | None, eta: Tensor | None
    ) -> Tensor:
        """Normalise rows with fixed statistics; this is differentiable in rows and parameters."""
        wide = widened(rows)
        rstd = torch.rsqrt(square.to(wide.dtype) + self.eps)
        scale, shift = channel_affine(weight, bias, eta, mean, rstd)
        y = wide * scale if shift is None else torch.addcmul(shift, wide, scale)
        return y.to(rows.dtype)

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Return ``(scale, shift, channel_dim)`` of the norm in eval mode, in float64.

        Raises:
            StabNormError: the statistics are not finite, or the norm is not affine with these options.
        """
        return self._folded(*self.running_statistics())

    def _folded(self, *statistics: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the affine map for these statistics: the variance, and before it the mean if there is one."""
        self.check_width()
        if not all(torch.isfinite(t).all() for t in statistics):
            raise StabNormError(
                f"{type(self).__name__} holds non-finite running statistics, so it has no affine map. Gather them anew"
            )
        *mean, square = (t.detach().double() for t in statistics)
        bias, eta = (None if t is None else t.detach().double() for t in (self.bias, getattr(self, "eta", None)))
        rstd = torch.rsqrt(square + self.eps)
        scale, shift = channel_affine(self.weight.detach().double(), bias, eta, mean[0] if mean else None, rstd)
        return scale, torch.zeros_like(scale) if shift is None else shift, self.channel_dim

    def _common_repr(self) -> str:
        options = f", variant={self.variant!r}" if self.variant != "corrected" else ""
        options += "" if self.channel_dim == -1 else f", channel_dim={self.channel_dim}"
        return options + (", sync=True" if self.sync else "")

    # -- how a norm becomes one ----------------------------------------------------------------------------------------

    @classmethod
    def plan_from_norm(cls, layer: NormLayer, like: Tensor | None = None, **options: Any) -> Conversion:
        """Build the new module with the norm's weight and bias; see the base class."""
        old = layer.module
        if layer.feature_dims > 1:
            raise StabNormError(
                f"its channels are on {layer.feature_dims} axes: only to='prepbn' or 'taper' can convert it"
            )
        like = floating_tensor_of(old) if like is None else like
        with tensors_like(like):
            options = cls.defaults_after(layer) | options
            new = cls(layer.num_features or UNKNOWN_WIDTH, channel_dim=layer.channel_dim, **options)
            new.any_width = layer.any_width
        new.to(like.dtype).train(old.training)
        if layer.bias is not None and new.bias is None:
            why = next((f"{name}=False" for name in ("bias", "center") if options.get(name) is False), cls.__name__)
            raise StabNormError(f"its bias would be lost: {why} has no place for one")
        kept = [new._take_over("weight", layer.gain_parameter, layer.gain, exactly=not layer.gain_offset)]
        kept += [new._take_over("bias", layer.bias_parameter, layer.bias)] if new.bias is not None else []
        gain, bias = layer.gain_parameter, layer.bias_parameter
        take_flags(new.weight, gain, bias)
        take_flags(new.bias, bias, gain)
        take_flags(getattr(new, "eta", None), gain, bias)
        return Conversion(", ".join(kept), lambda: new)

    @classmethod
    def defaults_after(cls, layer: NormLayer) -> dict[str, Any]:
        """Return the defaults of arguments that depend on the norm that is converted."""
        del layer
        return {}

    def _take_over(self, name: str, parameter: nn.Parameter | None, value: Tensor | None, exactly: bool = True) -> str:
        """Take over the old norm's parameter, or else its value, and return a note about it."""
        own = getattr(self, name)
        if value is None:
            return f"{name} new"
        if parameter is None or not exactly or parameter.shape != own.shape:
            own.data.copy_(value.detach())
            return f"{name} new, of the same value"
        for part in self.modules():  # a variant may have a child that holds it, too
            if getattr(part, name, None) is own:
                setattr(part, name, parameter)
        return f"{name} kept"


def running_values(moments: BatchMoments) -> Tensor:
    """Return a batch's mean and unbiased variance ``[2, C]``, or its mean square ``[1, C]`` if there is no mean.

    All values are NaN if the batch is empty or has a value that is not finite.
    """
    count, mean, square = moments.rows, moments.mean, moments.square
    values = square[None] if mean is None else torch.stack([mean, square * (count / (count - 1).clamp(min=1))])
    return torch.where(torch.isfinite(values).all() & (count > 0), values, torch.nan)


def check_variant(variant: Any) -> None:
    """Raise ValueError for an unknown `variant`."""
    check_choice("variant", variant, ("corrected", "official"))
