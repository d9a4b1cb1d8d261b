"""Norm classes that the user has described with `register_norm`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

from torch import nn

from stabnorm._checks import check_axis, check_choice, check_count, check_number, wrong_type
from stabnorm.functional import Kind
from stabnorm.norms.layer import SIZE_NAMES, NormLayer, eps_of
from stabnorm.norms.torch_own import channels_of_torch_class


def register_norm(
    norm_class: type[nn.Module],
    kind: Kind,
    *,
    channel_dim: int | str | None = None,
    num_features: str | int | None = None,
    eps: str | float | None = "eps",
    weight: str | None = "weight",
    bias: str | None = "bias",
    gain_offset: float = 0.0,
) -> None:
    """Describe a norm class of your own; this wins over everything `find_norms` would find out by itself.

    Subclasses are covered, and the most derived registered class counts. Registering a class again replaces its entry.

    Args:
        norm_class: The class.
        kind: "layer", "rms", "batch", "group" (the module has `num_groups`) or "instance".
        channel_dim: Axis of the input that holds the channels, or the attribute that says so. Default: by the class,
            where it derives from one of torch's norms; else -1 for "layer" and "rms", 1 for the others.
        num_features: Attribute with the number of channels, or the number; a shape like LayerNorm's
            `normalized_shape` will do. Default: the first of "num_features", "num_channels", "normalized_shape" and
            other customary names that the module has.
        eps: Attribute with eps, or its value; None for the dtype's own. Default: "eps".
        weight: Attribute with the weight, None when the class has none. Default: "weight".
        bias: Attribute with the bias, None when the class has none; an rms norm may lack it. Default: "bias".
        gain_offset: What the class adds to its weight before multiplying; 1 for `1 + weight`. Default: 0.

    Raises:
        TypeError: If `norm_class` is not an `nn.Module` class, or an argument has another type.
        ValueError: If `kind` is unknown, `channel_dim` is 0, the batch, or a number is out of range.

    Example:
        >>> import torch
        >>> from stabnorm import find_norms, register_norm
        >>> class Scaled(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.width, self.scale = width, nn.Parameter(torch.ones(width))
        >>> register_norm(Scaled, "rms", num_features="width", eps=1e-6, weight="scale", bias=None)
        >>> find_norms(Scaled(8))[0].num_features
        8
    """
    if not (isinstance(norm_class, type) and issubclass(norm_class, nn.Module)):
        raise TypeError(f"register_norm takes an nn.Module class, not {norm_class!r}. Pass the class, not an instance.")
    check_choice("kind", kind, get_args(Kind))
    attribute = ", or the name of the attribute that holds it"
    if channel_dim is not None and not isinstance(channel_dim, str):
        check_axis("channel_dim", channel_dim)
    if num_features is not None and not isinstance(num_features, str):
        check_count("num_features", num_features, hint=attribute)
    if eps is not None and not isinstance(eps, str):
        check_number("eps", eps, least=0, hint=attribute)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not isinstance(value, str):
            raise wrong_type(name, value, "the name of the attribute that holds it, or None")
    check_number("gain_offset", gain_offset)
    _REGISTERED[norm_class] = _Registration(kind, channel_dim, num_features, eps, weight, bias, gain_offset)


def is_registered(norm_class: type[nn.Module]) -> bool:
    """Whether the class, or one it derives from, was given to `register_norm`."""
    return any(cls in _REGISTERED for cls in norm_class.__mro__)


class _Registration(NamedTuple):
    kind: Kind
    channel_dim: int | str | None
    num_features: str | int | None
    eps: str | float | None
    weight: str | None
    bias: str | None
    gain_offset: float


_REGISTERED: dict[type[nn.Module], _Registration] = {}


def registered(name: str, module: nn.Module) -> NormLayer | None:
    """Describe a module whose class, or one it derives from, was registered; None for any other module."""
    entry = next((_REGISTERED[cls] for cls in type(module).__mro__ if cls in _REGISTERED), None)
    if entry is None:
        return None
    entry = _filled_in(entry, module)
    read = {
        argument: _read(name, module, argument, value) if isinstance(value, str) else value
        for argument, value in entry._asdict().items()
        if argument not in ("kind", "gain_offset")
    }
    shape = _shape(read["num_features"])
    num_features, groups = math.prod(shape), 1
    if entry.kind == "group":
        groups = _read(name, module, "kind", "num_groups")
    elif entry.kind == "instance":
        groups = num_features
    return NormLayer(
        name,
        module,
        entry.kind,
        read["channel_dim"],
        num_features,
        eps_of(read["eps"], read["weight"]),
        groups,
        len(shape),
        entry.weight,
        entry.bias,
        entry.gain_offset,
    )


def _filled_in(entry: _Registration, module: nn.Module) -> _Registration:
    """Fill in what was left to the kind and the class."""
    channel_dim, num_features, bias = entry.channel_dim, entry.num_features, entry.bias
    if channel_dim is None:
        channel_dim = channels_of_torch_class(module)
    if channel_dim is None:
        channel_dim = -1 if entry.kind in ("layer", "rms") else 1
    if num_features is None:
        num_features = next((name for name in SIZE_NAMES if hasattr(module, name)), "num_features")
    if entry.kind == "rms" and bias == "bias" and not hasattr(module, bias):
        bias = None
    return entry._replace(channel_dim=channel_dim, num_features=num_features, bias=bias)


def _read(name: str, module: nn.Module, argument: str, attribute: str) -> Any:
    if not hasattr(module, attribute):
        raise ValueError(
            f"{type(module).__name__} was registered as a norm with {argument}={attribute!r}, but layer {name!r} has "
            f"no attribute {attribute!r}. Call register_norm again with the right {argument}=; weight=, bias= and eps= "
            "may be None."
        )
    return getattr(module, attribute)


def _shape(features: int | Sequence[int]) -> tuple[int, ...]:
    return (features,) if isinstance(features, int) else tuple(features)
