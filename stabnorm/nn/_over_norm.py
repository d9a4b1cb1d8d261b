"""The class of a mixin over a norm class: made once, found again by pickle, called with the norm's own arguments."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from stabnorm._models.watched import own_class
from stabnorm.norms import Kind, NormLayer, is_registered, register_norm

_CLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}


def class_over(mixin: type[nn.Module], base: type[nn.Module], kind: Kind | None = None, **registration: Any) -> Any:
    """Return the class of `mixin` over `base`; the same arguments always give the same class.

    Its forward also accepts the input under the argument name that `base` uses.

    Args:
        mixin: a `ProgressiveNorm` class.
        base: a norm class whose `forward` takes the input as its first argument.
        kind: kind for `register_norm`, if the class is neither torch's own nor registered. Default: None.
        **registration: further arguments of `register_norm`.
    """
    made_of = (mixin, base, kind, tuple(sorted(registration.items())))
    if made_of not in _CLASSES:
        content: dict[str, Any] = {"__module__": mixin.__module__, "__doc__": mixin.__doc__, "_made_of": made_of}
        content["forward"] = _forward_like(base.forward, mixin)
        # Both are for TorchScript, which knows no super(), and of a class's annotations only tensors and the like.
        content["_norm_forward"] = _renamed(base.forward, "_norm_forward")
        content["__annotations__"] = {"lam": Tensor}
        made = type(f"{mixin.__name__}{base.__name__}", (mixin, base), content)
        if kind is None and not is_registered(base) and issubclass(base, nn.LayerNorm | nn.RMSNorm):
            kind = "layer" if issubclass(base, nn.LayerNorm) else "rms"
            registration = {"num_features": "normalized_shape", "channel_dim": "channel_dim"}
            registration["bias"] = "bias" if kind == "layer" else None
        if kind is not None:
            register_norm(made, kind, **registration)
        _CLASSES[made_of] = made
    return _CLASSES[made_of]


def class_after(mixin: type[nn.Module], layer: NormLayer) -> Any:
    """Return the class of `mixin` over the layer's class; `layer` has what `register_norm` needs to know."""
    base = own_class(layer.module)
    if base.forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) or is_registered(base):
        return class_over(mixin, base)
    return class_over(
        mixin, base, layer.kind, channel_dim=layer.channel_dim, num_features="_channels", eps=layer.eps,
        weight=layer.weight_name, bias=layer.bias_name, gain_offset=layer.gain_offset,
    )  # fmt: skip


def norm_class(norm: nn.Module) -> type[nn.Module]:
    """Return the class that a norm is a mixin over: the original class of a converted norm, even while watched."""
    base: type[nn.Module] = norm._made_of[1]  # type: ignore[index, assignment]
    return base


def reduced(norm: nn.Module) -> tuple[Any, ...] | None:
    """Return how pickle and deepcopy make an instance anew; None for a subclass of the user's, which has a name."""
    made_of = vars(type(norm)).get("_made_of")
    return None if made_of is None else (_blank, made_of, norm.__dict__)


def _blank(
    mixin: type[nn.Module], base: type[nn.Module], kind: Kind | None, registration: tuple[tuple[str, Any], ...]
) -> nn.Module:
    """Create an empty instance of `mixin` over `base`."""
    made: type[nn.Module] = class_over(mixin, base, kind, **dict(registration))
    return made.__new__(made)


def _for_torchscript(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the blend at the current lam, in eval mode."""
    return self.frozen(x)  # type: ignore[no-any-return]


def _forward_like(own: Callable[..., Any], mixin: type[nn.Module]) -> Callable[..., Tensor]:
    """Return the mixin's forward, which also accepts the input under the argument name of the norm's own forward."""
    name = [*inspect.signature(own).parameters][1]

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if name in kwargs:
            args = (kwargs.pop(name), *args)
        return mixin.forward(self, *args, **kwargs)  # type: ignore[no-any-return]

    forward.__wrapped__ = _for_torchscript  # TorchScript compiles the source of what a function wraps
    return forward


def _renamed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    renamed = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    renamed.__kwdefaults__, renamed.__annotations__ = function.__kwdefaults__, function.__annotations__
    return renamed
