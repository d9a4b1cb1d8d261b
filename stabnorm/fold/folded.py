"""Modules that take a folded norm's place: the identity, or one multiply-add. No class here names a normalization."""

from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._checks import check_axis, check_instance
from stabnorm._models.calls import tensor_input_of
from stabnorm.nn._base import Float32Buffers


class _Unfused(nn.Module):
    """Torch's encoder layers run a fused kernel on ``norm1.weight`` where both norms' eps are equal; NaN never is."""

    eps = float("nan")
    weight: Any = None
    bias: Any = None


class FoldedNorm(_Unfused, nn.Identity):
    """y = x, where a norm was folded into the weights around it.

    The input goes by whatever name the norm had for it; further arguments, such as a mask, are ignored.

    Shape:
        any, to the same.

    Raises:
        TypeError: it is called without a tensor.

    >>> x = torch.randn(2, 3)
    >>> FoldedNorm()(x) is x, FoldedNorm()(hidden_states=x) is x
    (True, True)
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input."""
        return tensor_input_of(args, kwargs)


class FrozenAffine(_Unfused, Float32Buffers):
    r"""y = scale x + shift per channel, in one operation: an eval-affine norm that no weight could take in.

    Scale and shift stay float32 under ``.to(torch.bfloat16)``, as the statistics they come from. The input goes by
    whatever name the norm had for it; further arguments, such as a mask, are ignored.

    Args:
        scale: ``[C]``.
        shift: ``[C]``.
        channel_dim: axis of the input that holds the channels. Default: -1.

    Shape:
        as the input; the axis `channel_dim` holds C.

    Raises:
        TypeError: scale or shift is no tensor, or it is called without one.
        ValueError: scale and shift do not have one number for each channel.

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
        if scale.ndim != 1 or scale.shape != shift.shape:
            shapes = f"{tuple(scale.shape)} and {tuple(shift.shape)}"
            raise ValueError(f"scale and shift have the shapes {shapes}. Give one number for each channel, [C]")
        check_axis("channel_dim", channel_dim)
        self.channel_dim = channel_dim
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Scale x + shift."""
        x = tensor_input_of(args, kwargs)
        scale, shift = self.scale, self.shift
        if self.channel_dim not in (-1, x.ndim - 1):
            shape = [1] * x.ndim
            shape[self.channel_dim] = -1
            scale, shift = scale.view(shape), shift.view(shape)
        return torch.addcmul(shift, x, scale).to(x.dtype)

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Give ``(scale, shift, channel_dim)`` in float64: it can be folded again after a change of the model."""
        return self.scale.double(), self.shift.double(), self.channel_dim

    def extra_repr(self) -> str:
        """Channels, and their axis where it is not the last."""
        return f"{self.scale.numel()}" + ("" if self.channel_dim == -1 else f", channel_dim={self.channel_dim}")
