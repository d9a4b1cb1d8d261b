"""The base of the norms that a `ProgressiveNorm` can blend into: they are affine in eval."""

from typing import Any

from torch import Tensor

from stabnorm.nn._channel_norm import ChannelNorm


class Branch(ChannelNorm):
    """A norm over one channel axis that is the branch `rep` of a `ProgressiveNorm`."""

    def blended_parameters(self) -> tuple[Tensor | None, ...]:
        """Return the parameters that `apply_with` takes, in its order; those that may be None are the last ones."""
        raise NotImplementedError

    def apply_with(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run `forward` on x and mask with other tensors for the parameters, whose gradients the frame controls."""
        raise NotImplementedError

    def of_batch(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the training output as rows ``[R, C]``, and which rows are valid, without updating statistics."""
        raise NotImplementedError

    def input_branch(self) -> tuple[float, Tensor, Tensor, bool]:
        """Share of this norm in the output, all of it; its gain, its eta, and whether it takes the mean out."""
        raise NotImplementedError
