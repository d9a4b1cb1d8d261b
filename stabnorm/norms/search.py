"""What any norm layer is: which axis holds its channels, what it normalises, its eps, its gain and its statistics.

Nothing else in stabnorm asks for a norm's class. A layer is known in one of three ways, tried in this order:

1. the user registered its class (`register_norm`);
2. its class is torch's own, or a subclass that keeps torch's `forward`;
3. its class has "norm" in the name, and a copy of it, run on random input, computes layer norm or rms norm.

A name promises nothing (a `LayerNormAct2d` ends in a ReLU), hence the third way. What is called a norm and is none of
these is named in a warning: a layer nobody watches must not look like a layer that is fine.
"""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from stabnorm._models.watched import own_class
from stabnorm.functional import Kind
from stabnorm.norms.probe import probe

__all__ = ["Kind", "NormLayer", "find_norms", "register_norm"]


@dataclass(frozen=True, eq=False)
class NormLayer:
    """One normalization layer of a model, whatever its class.

    Tensors are read from the live module at each access, so they follow `load_state_dict`, `.to()` and replaced
    parameters.

    Args:
        name: Dotted name in the model, without what `torch.compile` and checkpoint wrappers add.
        module: The user's own module.
        kind: What it normalises over: "layer", "rms", "batch", "group" or "instance".
        channel_dim: Axis of the input that holds the channels: -1, 1, or counted from the end for InstanceNorm, which
            takes unbatched input, too.
        num_features: Number of channels; the product when several trailing dims are normalised together.
        eps: What is added to the variance.
        groups: GroupNorm's groups; `num_features` for InstanceNorm. Default: 1.
        feature_dims: How many trailing dims are normalised together. Default: 1.
        weight_name: Attribute that holds the weight; None when there is none. Default: "weight".
        bias_name: Attribute that holds the bias; None when there is none. Default: "bias".
        gain_offset: What is added to the weight before it multiplies; 1 for Gemma's `1 + weight`. Default: 0.

    Example:
        >>> from stabnorm import find_norms
        >>> (layer,) = find_norms(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)))
        >>> layer.name, layer.kind, layer.channel_dim, layer.num_features, layer.eps
        ('1', 'layer', -1, 8, 1e-05)
    """

    name: str
    module: nn.Module
    kind: Kind
    channel_dim: int
    num_features: int
    eps: float
    groups: int = 1
    feature_dims: int = 1
    weight_name: str | None = field(default="weight", repr=False)
    bias_name: str | None = field(default="bias", repr=False)
    gain_offset: float = field(default=0.0, repr=False)

    @property
    def gain_parameter(self) -> nn.Parameter | None:
        """The parameter behind the gain, the one autograd gives gradients to."""
        weight = self._tensor(self.weight_name)
        return weight if isinstance(weight, nn.Parameter) else None

    @property
    def bias_parameter(self) -> nn.Parameter | None:
        """The parameter behind the bias."""
        bias = self._tensor(self.bias_name)
        return bias if isinstance(bias, nn.Parameter) else None

    @property
    def gain(self) -> Tensor | None:
        """The effective multiplier of each channel, shape (num_features,)."""
        weight = self._tensor(self.weight_name)
        if weight is None:
            return None
        return weight.flatten() + self.gain_offset if self.gain_offset else weight.flatten()

    @property
    def bias(self) -> Tensor | None:
        """What is added to each channel, shape (num_features,)."""
        bias = self._tensor(self.bias_name)
        return None if bias is None else bias.flatten()

    @property
    def running_mean(self) -> Tensor | None:
        """The running mean of each channel, where the module keeps one."""
        return self._tensor("running_mean")

    @property
    def running_var(self) -> Tensor | None:
        """The running variance of each channel, where the module keeps one."""
        return self._tensor("running_var")

    def _tensor(self, attribute: str | None) -> Tensor | None:
        value = getattr(self.module, attribute, None) if attribute else None
        return value if isinstance(value, Tensor) else None


def find_norms(
    model: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> list[NormLayer]:
    """Find the normalization layers of a model, in module order.

    The model is neither run nor changed, and the random state is left alone. A norm's own children are not looked at,
    and a module with several parents is listed once, under its first name. Layers that look like norms and are not
    understood are named in one `UserWarning`.

    Args:
        model: Any module.
        include: Regular expression, or several, searched for in a layer's name; only matches are listed. Default: all.
        exclude: The same, for layers to leave out; it wins over `include`. Default: none.

    Returns:
        The layers; empty when the model has none.

    Raises:
        ValueError: If a regular expression is invalid, or an attribute given to `register_norm` is missing.

    Example:
        >>> from stabnorm import find_norms
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(2), nn.InstanceNorm1d(8))
        >>> [(layer.name, layer.kind, layer.channel_dim) for layer in find_norms(model)]
        [('1', 'batch', 1), ('3', 'instance', -2)]
        >>> [layer.name for layer in find_norms(model, exclude=r"^1$")]
        ['3']
    """
    search = NormSearch(model, include, exclude)
    search.warn(stacklevel=3)
    return search.found


def register_norm(
    norm_class: type[nn.Module],
    kind: Kind,
    *,
    channel_dim: int | str = -1,
    num_features: str | int = "num_features",
    eps: str | float | None = "eps",
    weight: str | None = "weight",
    bias: str | None = "bias",
    gain_offset: float = 0.0,
) -> None:
    """Say what a norm class of your own computes; this wins over everything `find_norms` would find out by itself.

    Subclasses are covered; the most derived registered class counts. Registering a class again replaces what was said.

    Args:
        norm_class: The class.
        kind: "layer", "rms", "batch", "group" (the module has `num_groups`) or "instance".
        channel_dim: Axis of the input that holds the channels, or the attribute that says so. Default: -1.
        num_features: Attribute with the number of channels, or the number; a shape like LayerNorm's
            `normalized_shape` will do. Default: "num_features".
        eps: Attribute with eps, or its value; None for the dtype's own. Default: "eps".
        weight: Attribute with the weight, None when the class has none. Default: "weight".
        bias: Attribute with the bias, None when the class has none. Default: "bias".
        gain_offset: What the class adds to its weight before multiplying; 1 for `1 + weight`. Default: 0.

    Raises:
        TypeError: If `norm_class` is not an `nn.Module` class.
        ValueError: If `kind` is unknown, or `channel_dim` is 0, the batch.

    Example:
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
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} is unknown. Choose one of {', '.join(map(repr, get_args(Kind)))}.")
    if channel_dim == 0:
        raise ValueError("channel_dim=0 is the batch. Give the axis that holds the channels, usually -1 or 1.")
    _REGISTERED[norm_class] = _Registration(kind, channel_dim, num_features, eps, weight, bias, gain_offset)


# --- the walk ---

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}  # of torch.compile and checkpointing: not the user's names
_Named = list[tuple[str, nn.Module]]


class NormSearch:
    """One walk over a model, as `find_norms` does it: `found`, and what looks like a norm: `lazy` and `unknown`."""

    def __init__(
        self, model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
    ) -> None:
        self.include, self.exclude = _patterns("include", include), _patterns("exclude", exclude)
        self.found: list[NormLayer] = []
        self.lazy: _Named = []
        self.unknown: _Named = []
        self._holds_norm: dict[int, bool] = {}
        self._visit(model, "")

    def warn(self, stacklevel: int) -> None:
        """Name what was not understood."""
        if self.lazy or self.unknown:
            warnings.warn(_complaint(self.lazy, self.unknown), stacklevel=stacklevel)

    def _visit(self, module: nn.Module, name: str) -> bool:
        """List the norms in `module`, and say whether it is one or holds one."""
        if id(module) not in self._holds_norm:
            self._holds_norm[id(module)] = (
                self._known(module, name)
                # A list, not a generator: every child is visited, also after the first that holds a norm.
                or any([self._visit(child, _join(name, part)) for part, child in module.named_children()])
                or self._ask(module, name)  # last: what holds a norm, such as a PreNorm, is not one itself
            )
        return self._holds_norm[id(module)]

    def _known(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, _BatchNorm | _InstanceNorm) and isinstance(module, LazyModuleMixin):
            if self._wanted(name):
                self.lazy.append((name, module))
            return True
        layer = _registered(name, module) or _torch_own(name, module)
        if layer and self._wanted(name):
            self.found.append(layer)
        return layer is not None

    def _ask(self, module: nn.Module, name: str) -> bool:
        if not _looks_like_norm(module):
            return False
        if self._wanted(name):
            formula = probe(module)
            if formula:
                self.found.append(NormLayer(name, module, **formula._asdict()))
            else:
                self.unknown.append((name, module))
        return True

    def _wanted(self, name: str) -> bool:
        included = self.include is None or any(pattern.search(name) for pattern in self.include)
        return included and not any(pattern.search(name) for pattern in self.exclude or ())


def _join(name: str, part: str) -> str:
    return name if part in _WRAPPERS else f"{name}.{part}" if name else part


def _looks_like_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.Identity) or type(module).__module__.startswith("torch.nn.utils."):
        return False  # what stands where a norm was; weight_norm and spectral_norm, which normalise weights
    scripted = isinstance(module, torch.jit.ScriptModule)
    return "norm" in str(module.original_name if scripted else type(module).__name__).lower()


def _complaint(lazy: _Named, unknown: _Named) -> str:
    def listed(modules: _Named) -> list[str]:
        return [f"  {name or 'the model itself'} ({type(module).__name__})" for name, module in modules]

    lines = []
    if unknown:
        lines += ["These layers look like norms, but what they compute was not understood. They are left out:"]
        lines += listed(unknown)
        example = f"stabnorm.register_norm({type(unknown[0][1]).__name__}, kind=...)"
        lines += [f"Where one is a norm, register it with {example}; where it is none, leave it out with exclude=."]
    if lazy:
        lines += ["These lazy layers do not know their size yet and are left out. Run one batch first:", *listed(lazy)]
    return "\n".join(lines)


def _patterns(argument: str, given: str | Sequence[str] | None) -> list[re.Pattern[str]] | None:
    if given is None:
        return None
    patterns = []
    for pattern in [given] if isinstance(given, str) else given:
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"{argument}={pattern!r} is not a valid regular expression: {error}. "
                "It is searched for in the layers' names; write '.*' for anything."
            ) from error
    return patterns


# --- known by registration ---


def is_registered(norm_class: type[nn.Module]) -> bool:
    """Whether `register_norm` was told about the class or one it derives from."""
    return any(cls in _REGISTERED for cls in norm_class.__mro__)


class _Registration(NamedTuple):
    kind: Kind
    channel_dim: int | str
    num_features: str | int
    eps: str | float | None
    weight: str | None
    bias: str | None
    gain_offset: float


_REGISTERED: dict[type[nn.Module], _Registration] = {}


def _registered(name: str, module: nn.Module) -> NormLayer | None:
    said = next((_REGISTERED[cls] for cls in type(module).__mro__ if cls in _REGISTERED), None)
    if said is None:
        return None
    read = {
        argument: _read(name, module, argument, value) if isinstance(value, str) else value
        for argument, value in said._asdict().items()
        if argument not in ("kind", "gain_offset")
    }
    shape = _shape(read["num_features"])
    num_features, groups = math.prod(shape), 1
    if said.kind == "group":
        groups = _read(name, module, "kind", "num_groups")
    elif said.kind == "instance":
        groups = num_features
    return NormLayer(
        name,
        module,
        said.kind,
        read["channel_dim"],
        num_features,
        _eps(read["eps"], read["weight"]),
        groups,
        len(shape),
        said.weight,
        said.bias,
        said.gain_offset,
    )


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


def _eps(eps: float | None, weight: object) -> float:
    if eps is not None:
        return float(eps)
    return torch.finfo(weight.dtype if isinstance(weight, Tensor) else torch.float32).eps  # what torch's RMSNorm does


# --- known by type ---

_SPATIAL_DIMS = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}


def _torch_own(name: str, module: nn.Module) -> NormLayer | None:
    """Torch's norms, and subclasses that keep their `forward`: one that overrides it may compute anything."""
    forward = getattr(own_class(module), "forward", None)  # a scripted module's class has none
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        kind: Kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"
        shape = module.normalized_shape
        eps = _eps(module.eps, module.weight)
        return NormLayer(name, module, kind, -1, math.prod(shape), eps, feature_dims=len(shape))
    if isinstance(module, _BatchNorm) and forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return NormLayer(name, module, "batch", 1, module.num_features, module.eps)
    if isinstance(module, nn.GroupNorm) and forward is nn.GroupNorm.forward:
        return NormLayer(name, module, "group", 1, module.num_channels, module.eps, groups=module.num_groups)
    if isinstance(module, _InstanceNorm) and forward is _InstanceNorm.forward:
        channel_dim = -1 - next(dims for cls, dims in _SPATIAL_DIMS.items() if isinstance(module, cls))
        num_features = module.num_features
        return NormLayer(name, module, "instance", channel_dim, num_features, module.eps, groups=num_features)
    return None
