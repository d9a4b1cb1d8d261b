"""Modules that take a folded norm's place: the identity, or one multiply-add. No class here names a normalization."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from stabnorm._checks import check_axis, check_instance
from stabnorm._models.calls import input_name, input_of
from stabnorm._models.tree import PLAIN
from stabnorm.nn._base import Float32Buffers, LeavesFusedPath

_NEUTRAL = {"weight", "bias", "running_mean", "running_var"}  # of the batch norm that changes nothing


def _in_memory(t: Tensor, axis: int, to: int) -> Tensor:
    """Make t contiguous with one axis moved, or as it is where both are 0."""
    if to == 0:
        return t.contiguous()
    return t.movedim(axis, to).contiguous().movedim(to, axis)


class StandIn(LeavesFusedPath):
    """What stands in a norm's place: it is called as the norm was, and answers code that reads the norm's attributes.

    `forward` has one argument, so that `torch.fx` and TorchScript can read it. The call takes the input by whatever
    name the norm had for it; further arguments, such as a mask, are ignored. Where `contiguous` is True, the output
    lies in memory as the norm's did, for a `view` that comes after it: contiguous once the first of `axes` is moved to
    the second.
    """

    input_name = ""
    contiguous = False
    axes = (0, 0)
    __constants__: ClassVar = ["contiguous", "axes"]  # for TorchScript, which does not look at a class's attributes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward` with the input alone."""
        x = input_of(args, kwargs, self.input_name)
        if x is None:
            raise TypeError(f"{type(self).__name__} is called without an input. Pass a tensor, first or by keyword")
        return super().__call__(x)  # type: ignore[misc]

    def keep_memory(self, axes: Sequence[int] | None) -> None:
        """Write outputs in this order in memory; None leaves them as they are."""
        self.contiguous = axes is not None
        if axes is not None:
            self.axes = (axes[0], axes[1])

    def in_place_of(self, norm: nn.Module) -> Self:
        """Take over what other code may read of a norm: its sizes, its eps, and its tensors' dtype and device.

        The tensors are empty: whoever computes with them gets an error, and no number of a norm that is gone.
        """
        self.input_name = input_name(norm)
        for name, value in vars(norm).items():
            if not name.startswith("_") and isinstance(value, PLAIN) and not hasattr(self, name):
                setattr(self, name, value)
        for name, tensor in (*norm._parameters.items(), *norm._buffers.items()):
            if not hasattr(self, name) and (tensor is None or tensor.is_floating_point()):
                # Not on the meta device: no checkpoint would ever fill it, and it could not be moved from there.
                device = "cpu" if tensor is None or tensor.is_meta else tensor.device
                answer = None if tensor is None else torch.empty(0, dtype=tensor.dtype, device=device)
                nn.Module.register_buffer(self, name, answer, persistent=False)  # in low precision, too
        return self


class FoldedNorm(StandIn, nn.Identity):
    """y = x, where a norm was folded into the weights around it.

    Code that merges a batch norm into a convolution by its attributes, such as timm's `reparameterize`, finds those of
    the batch norm that changes nothing.

    Shape:
        any, to the same.

    Raises:
        TypeError: it is called without an input.

    >>> x = torch.randn(2, 3)
    >>> FoldedNorm()(x) is x, FoldedNorm()(hidden_states=x) is x
    (True, True)
    >>> FoldedNorm().in_place_of(nn.LayerNorm(3, eps=1e-6)).eps
    1e-06
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input."""
        return _in_memory(input, self.axes[0], self.axes[1]) if self.contiguous else input

    def in_place_of(self, norm: nn.Module) -> Self:
        """Take over what other code may read of a norm; a batch norm's numbers become those that change nothing."""
        super().in_place_of(norm)
        if "running_var" in norm._buffers and isinstance(vars(self).get("num_features"), int):
            like = self._buffers["running_var"]
            for name in _NEUTRAL & {*norm._parameters, *norm._buffers}:
                self._buffers.pop(name, None)  # they are made when they are read: a loader may overwrite a buffer
                self._non_persistent_buffers_set.discard(name)
            nn.Module.register_buffer(self, "like", like, persistent=False)
        return self

    def __getattr__(self, name: str) -> Any:
        like = vars(self).get("_buffers", {}).get("like")
        if name not in _NEUTRAL or like is None:
            return super().__getattr__(name)
        value = {"weight": 1.0, "running_var": 1.0 - float(vars(self).get("eps") or 0.0)}.get(name, 0.0)
        return torch.full((vars(self)["num_features"],), value, dtype=like.dtype, device=like.device)


class FrozenAffine(StandIn, Float32Buffers):
    r"""y = scale x + shift per channel, in one operation: an eval-affine norm that no weight could take in.

    Scale and shift stay float32 under ``.to(torch.bfloat16)``, as the statistics they come from.

    Args:
        scale: ``[C]``, or with the sizes of several trailing axes, such as ``[heads, C]``.
        shift: the same shape.
        channel_dim: axis of the input that holds the channels. Default: -1.

    Shape:
        as the input; the axis `channel_dim` holds C.

    Raises:
        TypeError: scale or shift is no tensor, or it is called without an input.
        ValueError: scale and shift do not have one number for each channel, or several axes are not the last ones.

    >>> affine = FrozenAffine(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
    >>> affine(torch.ones(1, 2))
    tensor([[2., 4.]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, channel_dim: int = -1) -> None:
        super().__init__()
        check_instance("scale", scale, Tensor, "a tensor [C]")
        check_instance("shift", shift, Tensor, "a tensor [C]")
        if scale.ndim == 0 or scale.shape != shift.shape:
            shapes = f"{tuple(scale.shape)} and {tuple(shift.shape)}"
            raise ValueError(f"scale and shift have the shapes {shapes}. Give one number for each channel, [C]")
        check_axis("channel_dim", channel_dim)
        if scale.ndim > 1 and channel_dim != -1:
            raise ValueError(
                f"channel_dim={channel_dim} goes with a scale of one axis, not {scale.ndim}. Leave it at -1"
            )
        self.channel_dim = channel_dim
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, input: Tensor) -> Tensor:
        """Scale x + shift."""
        # Transposed, not reshaped by the input's number of axes: torch.fx traces without knowing it.
        x = input if self.channel_dim == -1 else input.transpose(self.channel_dim, -1)
        y = torch.addcmul(self.shift, x, self.scale).to(input.dtype)
        y = y if self.channel_dim == -1 else y.transpose(self.channel_dim, -1)
        return _in_memory(y, self.axes[0], self.axes[1]) if self.contiguous else y

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Give ``(scale, shift, channel_dim)`` in float64: it can be folded again after a change of the model."""
        return self.scale.double(), self.shift.double(), self.channel_dim

    def extra_repr(self) -> str:
        """Channels, and their axis where it is not the last."""
        sizes = " x ".join(map(str, self.scale.shape))
        return sizes + ("" if self.channel_dim == -1 else f", channel_dim={self.channel_dim}")

    def _own_buffers(self) -> dict[str, Tensor | None]:
        return {name: self._buffers[name] for name in ("scale", "shift")}
