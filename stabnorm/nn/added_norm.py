"""Mixins that normalise what a module returns: the whole output, or the queries and keys of each head."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stabnorm._models.devices import floating_tensor_of
from stabnorm.nn.mixed_in import AddsNorm

NormKind = Literal["layer", "rms"]


def new_norm(kind: NormKind, width: int, beside: nn.Module) -> nn.Module:
    """Build a norm on the device and in the precision of what is beside it."""
    like = floating_tensor_of(beside)
    with torch.inference_mode(False):
        cls = nn.LayerNorm if kind == "layer" else nn.RMSNorm
        return cls(width, eps=1e-5, device=like.device, dtype=like.dtype).train(beside.training)


class NormedOutput(AddsNorm):
    """A mixin over a layer whose output goes through the child `output_norm`; of a tuple, the first of it."""

    adds: ClassVar[tuple[str, ...]] = ("output_norm",)
    output_norm: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output, normalised."""
        y = super().forward(*args, **kwargs)
        return (self.output_norm(y[0]), *y[1:]) if isinstance(y, tuple) else self.output_norm(y)


class NormedHeads(AddsNorm):
    """A mixin over a projection to queries, keys or both: each head is normalised by itself.

    Attributes:
        head_sizes: for each slice of the output, in order, its number of heads, and whether they are normalised.
        head_norms: the norms of the slices that are.
    """

    adds: ClassVar[tuple[str, ...]] = ("head_norms", "head_sizes")
    head_norms: nn.ModuleList
    head_sizes: tuple[tuple[int, int, bool], ...]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the projection with normalised heads."""
        y: Tensor = super().forward(*args, **kwargs)
        norms = iter(self.head_norms)
        slices = y.split([width for _, width, _ in self.head_sizes], -1)
        parts = [
            next(norms)(part.unflatten(-1, (heads, -1))).flatten(-2) if normed else part
            for part, (heads, _, normed) in zip(slices, self.head_sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
