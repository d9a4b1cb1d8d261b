"""`FusedNorm` computes a norm and the moments of its input in one pass, see `stabnorm.ops.observed`."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._models.calls import input_of
from stabnorm._models.watched import has_stand_in, own_class
from stabnorm.functional import RawMoments
from stabnorm.monitor.accumulators import Accumulators
from stabnorm.norms import NormLayer
from stabnorm.ops.dispatch import one_at_a_time
from stabnorm.ops.observed import NormKind, Spec, backend_for, observed_norm


class FusedNorm:
    """Replaces the forward of one of torch's own norms.

    The hook before the forward passes the input to `take`, and the forward that follows adds its moments. If no backend
    supports the input, the hook adds the moments itself, and torch's forward runs.

    Args:
        into: the accumulators, which say which moments are needed; the time of the norm is added to theirs.
        layer: the norm, for which `can_fuse` is true.
        plainly: adds the moments of an input without computing the norm.
    """

    def __init__(self, into: Accumulators, layer: NormLayer, plainly: Callable[[Tensor, Tensor | None], None]) -> None:
        self.into, self.plainly = into, plainly
        self.module: Any = layer.module  # whose gain, bias and eps may be others at each forward
        self.kind: NormKind = "rms" if layer.kind == "rms" else "layer"
        self._due: tuple[Tensor, Tensor | None, RawMoments, Spec, str] | None = None

    def forget(self) -> None:
        """Drop an input that was taken, because another forward begins."""
        self._due = None

    def take(self, module: nn.Module, x: Tensor, valid: Tensor | None, account: RawMoments) -> bool:
        """Take an input; return whether the next forward will add its moments to the accumulator."""
        shape, eps = tuple(self.module.normalized_shape), self.module.eps
        if module is not self.module or "forward" in vars(module):  # a replica, or somebody else's forward
            return False
        if eps is None:  # RMSNorm's, which torch takes for the dtype it computes in
            if x.dtype != torch.float32:
                return False
            eps = torch.finfo(torch.float32).eps
        spec = Spec(self.kind, shape, eps, self.into.tokens, self.into.normalized and self.into.dear)
        backend = backend_for(x, *self._affine, spec, account)
        self._due = None if backend is None else (x, valid, account, spec, backend)
        return backend is not None

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the fused forward, or the module's own one."""
        if self._due is None:
            return type(module).forward(module, *args, **kwargs)
        start = time.perf_counter()
        (taken, valid, account, spec, backend), self._due = self._due, None
        fused = input_of(args, kwargs) is taken
        if fused:
            with one_at_a_time:
                y = observed_norm(taken, *self._affine, spec, valid, account, backend)
        else:  # another hook has replaced the input
            self.plainly(taken, valid)
        self.into.seconds += time.perf_counter() - start
        return y if fused else type(module).forward(module, *args, **kwargs)

    @property
    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        return self.module.weight, getattr(self.module, "bias", None)


def can_fuse(layer: NormLayer) -> bool:
    """Whether the norm is one of torch's own with torch's own forward."""
    module = layer.module
    own = own_class(module) in (nn.LayerNorm, nn.RMSNorm) and "forward" not in vars(module)
    return own and not has_stand_in(module)
