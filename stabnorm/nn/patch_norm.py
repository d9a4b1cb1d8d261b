"""`NormedPatches`: a convolution that cuts an image into patches, with a norm on each side of its map."""

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from stabnorm.nn.mixed_in import AddsNorm


class NormedPatches(AddsNorm):
    r"""A mixin over a convolution whose stride is its kernel, see `stabnorm.remedies.dual_patch_norm`.

    .. math:: y = \mathrm{norm}_2(W\,\mathrm{norm}_1(p) + b)

    p is a patch, flattened to one vector in the order of the weight: channels, then rows, then columns.

    Attributes:
        patch_norm: norm_1, over the numbers of a patch.
        output_norm: norm_2, over the output channels.

    Shape:
        ``[B, C, H, W]`` to ``[B, D, H / P, W / Q]``, as the convolution.
    """

    adds: ClassVar[tuple[str, ...]] = ("patch_norm", "output_norm")
    patch_norm: nn.Module
    output_norm: nn.Module

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Return the map of the normalised patches, normalised."""
        conv = cast(nn.Conv2d, self)
        rows, columns = conv.kernel_size
        height, width = input.shape[-2] // rows, input.shape[-1] // columns
        cut = input[..., : height * rows, : width * columns]  # what a convolution without padding leaves out
        parts = cut.unflatten(-1, (width, columns)).unflatten(-3, (height, rows))  # [B, C, h, rows, w, columns]
        patches = parts.permute(0, 2, 4, 1, 3, 5).flatten(3)
        mapped = F.linear(self.patch_norm(patches), conv.weight.flatten(1), conv.bias)
        return self.output_norm(mapped).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
