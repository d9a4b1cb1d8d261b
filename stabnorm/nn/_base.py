"""What every norm of this package is: affine in eval, and the one who knows how it is made, measured and folded.

`convert_norms`, `recalibrate_norms` and `fold_norms` ask a norm for these through `EvalAffineNorm` and know no class.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stabnorm.norms import NormLayer
from stabnorm.ops.rows import LOW_PRECISION

TARGETS: dict[str, type["EvalAffineNorm"]] = {}  # convert_norms(to=...); each class enters itself in its own file
_FROM_THE_NORM = {"self", "num_features", "normalized_shape", "channel_dim", "kind"}  # arguments that are not options


class Conversion(NamedTuple):
    """How a norm becomes one of this package.

    Attributes:
        note: what is kept of the norm.
        carry_out: gives the module that stands in the norm's place. Before the call the norm is what it was.
    """

    note: str
    carry_out: Callable[[], nn.Module]


class Float32Buffers(nn.Module):
    """Floating buffers stay float32 under `.to(torch.bfloat16)` and `.half()`: a running mean needs its digits."""

    def _own_buffers(self) -> dict[str, Tensor | None]:
        return self._buffers

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As `nn.Module` does; a tensor that `torch.set_default_dtype` made low in precision becomes float32."""
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


class EvalAffineNorm(Float32Buffers):
    """Base of the norms of this package."""

    _in_place: ClassVar[bool] = False  # whether a conversion keeps the norm object itself

    # -- how it is made from a norm ------------------------------------------------------------------------------------

    @classmethod
    def from_norm(cls, layer: NormLayer, **options: Any) -> nn.Module:
        """The successor of a layer or rms norm: its size and channel axis, and its parameters where they can stay.

        Args:
            layer: from `find_norms`.
            **options: arguments of this class.

        Raises:
            ValueError: an option is out of range.
            StabNormError: the norm cannot have this successor, and why.
        """
        return cls.plan_from_norm(layer, **options).carry_out()

    @classmethod
    def plan_from_norm(cls, layer: NormLayer, like: Tensor | None = None, **options: Any) -> Conversion:
        """Build all that `from_norm` needs, and change nothing yet; it raises what `from_norm` raises.

        Args:
            layer: from `find_norms`.
            like: a tensor with the device and the precision of new parameters. Default: the norm's own.
            **options: arguments of this class.
        """
        raise NotImplementedError

    @classmethod
    def conversion_options(cls) -> set[str]:
        """The arguments of this class that the norm does not determine."""
        return {*inspect.signature(cls.__init__).parameters} - _FROM_THE_NORM

    # -- its statistics ------------------------------------------------------------------------------------------------

    def running_statistics(self) -> tuple[Tensor, ...]:
        """The buffers ``[C]`` that eval normalises with.

        Raises:
            StabNormError: they cannot be measured anew, and why.
        """
        raise NotImplementedError

    def batch_statistics(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What one batch says they are, ``[len(running_statistics()), C]``.

        All of it is NaN where the batch has no valid token or anything that is not finite. The buffers do not change.
        """
        raise NotImplementedError

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """What the norm is in eval: ``(scale, shift, channel_dim)``, y = scale x + shift per channel, in float64."""
        raise NotImplementedError


def target_name(norm: EvalAffineNorm) -> str:
    """The name of the public class that a norm is an instance of."""
    public = TARGETS.values()
    return next((cls.__name__ for cls in type(norm).__mro__ if cls in public), type(norm).__name__)


@contextmanager
def tensors_like(like: Tensor) -> Iterator[None]:
    """New tensors are on the device of `like` and in float32, also where Lightning builds a model of bf16-true."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with like.device:
            yield
    finally:
        torch.set_default_dtype(before)
