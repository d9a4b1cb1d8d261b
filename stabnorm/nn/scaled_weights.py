"""`ScaledWeights`: weights and biases that are multiplied by one number for whoever reads them."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from stabnorm.nn.mixed_in import ComputedWeights


class ScaledWeights(ComputedWeights):
    r"""A mixin over a norm or a linear layer, see `scale_by_depth` and `scale_residuals`.

    .. math:: \hat w = s\,w

    A constant s is in no checkpoint, and neither trained nor decayed. A learnable one is the parameter `scale_gain`.

    Attributes:
        scale_factor: s, where it is constant; what the learnable one began with, else.
        scale_gain: s, shape (1,), where it is learnable.
        scale_offset: what the module adds to its weight before it multiplies, such as 1 in Gemma's norms.
    """

    adds: ClassVar[tuple[str, ...]] = ("scale_gain", "scale_factor", "scale_offset")
    scale_factor: float
    scale_offset: float
    scale_gain: Tensor | None

    def adopt(self, factor: float, learnable: bool = False, offset: float = 0.0) -> None:
        """Add the scale to a module whose class was set to this mixin over its own."""
        self.scale_factor, self.scale_offset = factor, offset
        like = next(self.parameters(recurse=False))
        self.register_parameter("scale_gain", nn.Parameter(like.new_full((1,), factor)) if learnable else None)

    @torch.no_grad()
    def begin(self) -> None:
        """Start again with the first scale."""
        if self.scale_gain is not None:
            self.scale_gain.fill_(self.scale_factor)

    def computed(self, name: str, parameter: Tensor) -> Tensor:
        """Return the parameter, scaled; see the base class."""
        scale = self.scale_factor if self.scale_gain is None else self.scale_gain.to(parameter.dtype)
        if name == "weight" and self.scale_offset:
            return (parameter + self.scale_offset) * scale - self.scale_offset
        return parameter * scale

    def extra_repr(self) -> str:
        """Return the arguments of the layer, and the scale."""
        scale = f"scale={self.scale_factor:.4g}" if self.scale_gain is None else "scale=learnable"
        return ", ".join(filter(None, [super().extra_repr(), scale]))
