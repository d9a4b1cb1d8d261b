"""The base of every norm of this package, which knows how it is made from another norm, measured and folded.

`convert_norms`, `recalibrate_norms` and `fold_norms` use these methods of `EvalAffineNorm` and know none of its
subclasses.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from stabnorm._models.tree import PLAIN
from stabnorm.norms import NormLayer
from stabnorm.ops.rows import LOW_PRECISION

TARGETS: dict[str, type["EvalAffineNorm"]] = {}  # by the name in convert_norms(to=...); each class registers itself
_FROM_THE_NORM = {"self", "num_features", "normalized_shape", "channel_dim", "kind"}  # arguments that are not options


class Conversion(NamedTuple):
    """The plan by which a norm becomes one of this package.

    Attributes:
        note: what is kept of the norm.
        carry_out: returns the module that takes the norm's place. The norm does not change before this call.
    """

    note: str
    carry_out: Callable[[], nn.Module]


class LeavesFusedPath(nn.Module):
    """What torch's encoder layers must call: their fused path for eval would take it for a layer norm."""


class Float32Buffers(nn.Module):
    """Keeps floating buffers in float32 under `.to(torch.bfloat16)` and `.half()`: a running mean needs its digits."""

    def _own_buffers(self) -> dict[str, Tensor | None]:
        return self._buffers

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer like `nn.Module`; a tensor of low precision, from the default dtype, becomes float32."""
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


class EvalAffineNorm(Float32Buffers, LeavesFusedPath):
    """Base of the norms of this package."""

    _in_place: ClassVar[bool] = False  # whether a conversion keeps the norm object itself
    __jit_unused_properties__: ClassVar[list[str]] = ["sync", "fits_blended_kernels", "_channels", "_is_hf_initialized"]
    without_numbers = False  # True: it was built on the meta device, and has got no numbers yet

    # -- built without numbers, on the meta device ---------------------------------------------------------------------

    @property
    def _is_hf_initialized(self) -> bool:
        """Hugging Face's mark on a module whose tensors all hold numbers.

        Its `from_pretrained` builds the model on the meta device and calls neither `to_empty` nor `load_state_dict`. It
        puts tensors in place, those that the checkpoint lacks with whatever the memory held, and marks what it loaded.
        """
        if "_is_hf_initialized" not in vars(self):
            raise AttributeError("_is_hf_initialized")
        return bool(vars(self)["_is_hf_initialized"])

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        vars(self)["_is_hf_initialized"] = value
        if value and self.without_numbers:
            self._fill_in({name for name, tensor in self._own_tensors() if hasattr(tensor, "_is_hf_initialized")})

    def _own_tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]

    def _fill_in(self, loaded: set[str]) -> None:
        """Give first values to all tensors of its own but those of these names."""
        raise NotImplementedError

    # -- how it is made from a norm ------------------------------------------------------------------------------------

    @classmethod
    def from_norm(cls, layer: NormLayer, **options: Any) -> nn.Module:
        """Build a layer or rms norm's successor, with its size, channel axis and, where possible, parameters.

        Args:
            layer: the norm, from `find_norms`.
            **options: arguments of this class.

        Raises:
            ValueError: an option is out of range.
            StabNormError: the norm cannot have this successor; the message says why.
        """
        return cls.plan_from_norm(layer, **options).carry_out()

    @classmethod
    def plan_from_norm(cls, layer: NormLayer, like: Tensor | None = None, **options: Any) -> Conversion:
        """Build all that `from_norm` needs without changing the norm; raise the same errors as `from_norm`.

        Args:
            layer: the norm, from `find_norms`.
            like: a tensor that has the device and precision of the new parameters. Default: one of the norm's own.
            **options: arguments of this class.
        """
        raise NotImplementedError

    @classmethod
    def conversion_options(cls) -> set[str]:
        """Return the names of the arguments that do not follow from the norm."""
        return {*inspect.signature(cls.__init__).parameters} - _FROM_THE_NORM

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Raise the error of the constructor if an option is out of range."""
        cls(1, **options)  # type: ignore[call-arg]

    # -- its statistics ------------------------------------------------------------------------------------------------

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Return the buffers ``[C]`` that eval mode normalises with.

        Raises:
            StabNormError: they cannot be measured again; the message says why.
        """
        raise NotImplementedError

    def batch_statistics(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the same statistics of one batch, ``[len(running_statistics()), C]``; the buffers do not change.

        All of them are NaN if the batch has no valid token or a value that is not finite.
        """
        raise NotImplementedError

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Return ``(scale, shift, channel_dim)``, in float64: in eval mode y = scale x + shift for each channel."""
        raise NotImplementedError


def warn_of_partial_checkpoint(norm: EvalAffineNorm, prefix: str) -> None:
    """Say that a checkpoint without any tensor of a norm, such as an adapter's, leaves its statistics as they are."""
    if prefix.endswith("original_module."):
        return  # PEFT keeps it beside the copy that runs, which the checkpoint holds
    what = "lam and running statistics" if hasattr(norm, "lam") else "running statistics"
    warnings.warn(
        f"a checkpoint that holds nothing of {target_name(norm)} was loaded, so its {what} stay as they are. An "
        "adapter saves them only for the modules in modules_to_save, see docs/loading.md. Load them as well, or ignore "
        "this if they did not change",
        stacklevel=2,
    )


def target_name(norm: EvalAffineNorm) -> str:
    """Return the name of the public class that a norm is an instance of."""
    public = TARGETS.values()
    return next((cls.__name__ for cls in type(norm).__mro__ if cls in public), type(norm).__name__)


def one_node(norm: nn.Module, x: Proxy, mask: Any) -> Any:
    """Call a norm as one node of the graph that `torch.fx` traces, as it does with torch's own modules."""
    given = (x,) if mask is None else (x, mask)
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(norm), given, {})  # type: ignore[attr-defined]


def take_flags(new: nn.Parameter | None, *olds: nn.Parameter | None) -> None:
    """Give a new parameter what the first of the old ones says about itself: whether it is trained, and plain marks.

    Such marks are `_is_hf_initialized`, `_no_weight_decay` or `sequence_parallel`.
    """
    old = next((old for old in olds if old is not None), None)
    if new is None or old is None:
        return
    new.requires_grad_(old.requires_grad)
    for name, value in vars(old).items():
        if isinstance(value, PLAIN):
            setattr(new, name, value)


@contextmanager
def tensors_like(like: Tensor) -> Iterator[None]:
    """Create new tensors on the device of `like` and in float32, also if Lightning builds the model in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with like.device, torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(before)
