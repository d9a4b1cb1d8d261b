"""A norm that runs in one pass with what observes it: `FusedNorm` takes its forward, see `stabnorm.ops.observed`."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._models.watched import has_stand_in, own_class
from stabnorm.functional import RawMoments
from stabnorm.monitor.accumulators import Accumulators
from stabnorm.norms import NormLayer
from stabnorm.ops.observed import NormKind, Spec, backend_for, observed_norm


class FusedNorm:
    """Stands in for the forward of one of torch's own norms.

    The hook before the forward hands its input over (`take`), and the forward that follows adds its moments. Where no
    backend takes the input, the hook adds them itself, and the forward is torch's.

    Args:
        into: says which moments are wanted, and counts the time, the norm's own included.
        layer: the norm; `can_fuse` says whether it is one of those.
        plainly: adds the moments of an input without the norm.
    """

    def __init__(self, into: Accumulators, layer: NormLayer, plainly: Callable[[Tensor, Tensor | None], None]) -> None:
        self.into, self.plainly = into, plainly
        self.module: Any = layer.module  # whose gain, bias and eps may be others at each forward
        self.kind: NormKind = "rms" if layer.kind == "rms" else "layer"
        self._due: tuple[Tensor, Tensor | None, RawMoments, Spec, str] | None = None

    def forget(self) -> None:
        """What was taken is not to be added: another forward begins."""
        self._due = None

    def take(self, module: nn.Module, x: Tensor, valid: Tensor | None, account: RawMoments) -> bool:
        """Whether the forward that follows will add the moments of ``x`` to the account."""
        shape, eps = tuple(self.module.normalized_shape), self.module.eps
        if module is not self.module or "forward" in vars(module):  # a replica, or somebody else's forward
            return False
        if eps is None:  # RMSNorm's, which torch takes for the dtype it computes in
            if x.dtype != torch.float32:
                return False
            eps = torch.finfo(torch.float32).eps
        spec = Spec(self.kind, shape, eps, self.into.tokens, self.into.normalized)
        backend = backend_for(x, *self._affine, spec, account)
        self._due = None if backend is None else (x, valid, account, spec, backend)
        return backend is not None

    def __call__(self, x: Tensor) -> Tensor | None:
        """The forward; None: the module's own has to run."""
        if self._due is None:
            return None
        start = time.perf_counter()
        (taken, valid, account, spec, backend), self._due = self._due, None
        y = None
        if x is taken:
            y = observed_norm(x, *self._affine, spec, valid, account, backend)
        else:  # another hook has changed it since
            self.plainly(taken, valid)
        self.into.seconds += time.perf_counter() - start
        return y

    @property
    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        return self.module.weight, getattr(self.module, "bias", None)


def can_fuse(layer: NormLayer) -> bool:
    """Whether the norm is one of torch's own, whose forward is nobody else's."""
    module = layer.module
    own = own_class(module) in (nn.LayerNorm, nn.RMSNorm) and "forward" not in vars(module)
    return own and not has_stand_in(module)
