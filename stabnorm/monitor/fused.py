"""A norm that runs in one pass with what observes it: `FusedNorm` takes its forward, see `stabnorm.ops.observed`."""

import time
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stabnorm.functional import RawMoments
from stabnorm.norms import NormLayer
from stabnorm.ops.observed import NormKind, Spec, body_for, observed_norm

if TYPE_CHECKING:
    from stabnorm.monitor.observe import Observer


class FusedNorm:
    """Stands in for the forward of one of torch's own norms.

    The hook before the forward hands the input's account over (`take`); the forward that follows fills it. Where no
    kernel takes the input, the hook fills it itself, and the forward is torch's.

    Args:
        observer: says which moments are wanted, and counts the time, the norm's own included.
        layer: the norm; `can_fuse` says whether it is one of those.
    """

    def __init__(self, observer: "Observer", layer: NormLayer) -> None:
        module: Any = layer.module
        kind: NormKind = "rms" if layer.kind == "rms" else "layer"
        self.spec = Spec(kind, tuple(module.normalized_shape), layer.eps, observer.tokens, observer.normalized)
        self.module = module  # whose gain and bias may be others at each forward
        self.observer = observer
        self._due: tuple[RawMoments, Tensor | None, str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return object, ()  # a copy of the model is not watched

    def forget(self) -> None:
        """What was taken is not to be filled: another forward begins."""
        self._due = None

    def take(self, x: Tensor, valid: Tensor | None, account: RawMoments) -> bool:
        """Whether the forward that follows will add the moments of ``x`` to the account."""
        body = body_for(x, self.module.weight, getattr(self.module, "bias", None), self.spec, account)
        self._due = None if body is None else (account, valid, body)
        return body is not None

    def __call__(self, x: Tensor) -> Tensor | None:
        """The forward; None: the module's own has to run."""
        if self._due is None:
            return None
        start = time.perf_counter()
        (account, valid, body), self._due = self._due, None
        y = observed_norm(x, self.module.weight, getattr(self.module, "bias", None), self.spec, valid, account, body)
        self.observer.seconds += time.perf_counter() - start
        return y


def can_fuse(layer: NormLayer) -> bool:
    """Whether the norm is one of torch's own, and nobody has replaced its forward."""
    module = layer.module
    return type(module) in (nn.LayerNorm, nn.RMSNorm) and "forward" not in vars(module)
