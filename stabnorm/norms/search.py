"""`find_norms`: which modules of a model are norms.

Nothing else in stabnorm asks for a norm's class. A layer is known in one of three ways, tried in this order:

1. the user registered its class (`register_norm`);
2. its class is torch's own, or a subclass that keeps torch's `forward`;
3. its class, one that it derives from, or the attribute that holds it has "norm" in the name (or is an attribute such
   as `ln_1`), and a copy of it, run on random input, computes a norm; or it derives from torch's batch, group or
   instance norm, and does something else behind it, as timm's `BatchNormAct2d` with its activation.

The third way does not trust the name, because a `LayerNormAct2d` ends in a ReLU. A layer that is called a norm and is
none of these is named in a warning: a layer that nobody watches must not look like a layer that is fine. Names that
deny it, such as `NoNorm`, or that speak of other things, such as `Normalize`, raise no warning; nor do blocks that hold
a convolution, such as a `ConvNormAct` without its norm or a `NormFreeBlock`.
"""

import re
import warnings
from collections.abc import Hashable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from stabnorm._checks import check_model
from stabnorm._log import printable
from stabnorm._models.names import NameFilter, Patterns
from stabnorm._models.tree import PLAIN
from stabnorm._models.watched import own_class
from stabnorm._models.wrappers import is_scripted, plain_name
from stabnorm.norms.layer import NormLayer
from stabnorm.norms.probe import Formula, probe, probe_applied
from stabnorm.norms.registry import registered
from stabnorm.norms.torch_own import torch_own


def find_norms(
    model: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
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
        TypeError: If `model` is no module, or a pattern no string.
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


_Named = list[tuple[str, nn.Module]]


class NormSearch:
    """One walk over a model, as `find_norms` does it.

    Attributes:
        found: the norms.
        lazy: modules that are norms, but do not know their size yet.
        unknown: modules that look like norms, but what they compute was not understood.
    """

    def __init__(self, model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> None:
        check_model("model", model)
        self._wanted = NameFilter(include, exclude)
        self.found: list[NormLayer] = []
        self.lazy: _Named = []
        self.unknown: _Named = []
        self._holds_norm: dict[int, bool] = {}
        self._formulas: dict[Hashable, Formula | None] = {}  # of modules that differ in nothing that a probe can see
        self._visit(model, "", ())

    def warn(self, stacklevel: int) -> None:
        """Name the layers that were not understood, in one `UserWarning`."""
        if self.lazy or self.unknown:
            warnings.warn(_complaint(self.lazy, self.unknown), stacklevel=stacklevel)

    def _visit(self, module: nn.Module, name: str, around: tuple[nn.Module, ...]) -> bool:
        """List the norms in `module`, and say whether it is one or holds one. `around` holds it, innermost first."""
        if id(module) not in self._holds_norm:
            self._holds_norm[id(module)] = (
                self._known(module, name)
                # A list, not a generator: every child is visited, also after the first that holds a norm.
                or any(
                    [
                        self._visit(child, _join(name, part), (module, *around))
                        for part, child in module.named_children()
                    ]
                )
                or self._ask(module, name, around)  # last: what holds a norm, such as a PreNorm, is not one itself
            )
        return self._holds_norm[id(module)]

    def _known(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, _BatchNorm | _InstanceNorm) and isinstance(module, LazyModuleMixin):
            if self._wanted(name):
                self.lazy.append((name, module))
            return True
        layer = registered(name, module) or torch_own(name, module)
        if layer and self._wanted(name):
            self.found.append(layer)
        return layer is not None

    def _ask(self, module: nn.Module, name: str, around: tuple[nn.Module, ...]) -> bool:
        names = _class_names(module)
        if not any(_NORM.search(each) for each in names) and not (names and _is_called_norm(module, name)):
            return False
        formula = self._formula(module)
        if formula is None and not _claims_to_be_norm(module, names):
            return False
        if self._wanted(name):
            if formula is None:
                self.unknown.append((name, module))
            else:
                if not formula.num_features:
                    formula = formula._replace(
                        num_features=expected_width(name, around) or width_of_neighbours(module, around)
                    )
                self.found.append(NormLayer(name, module, **formula._asdict()))
        return True

    def _formula(self, module: nn.Module) -> Formula | None:
        tensors = (*module.named_parameters(), *module.named_buffers())
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)
        plain = tuple((name, value) for name, value in vars(module).items() if isinstance(value, PLAIN))
        same = (own_class(module), str(module), shapes, plain)
        if "forward" in vars(module):
            return None
        if same not in self._formulas:
            self._formulas[same] = probe_applied(module) or probe(module)
        return self._formulas[same]


def _join(name: str, part: str) -> str:
    return plain_name(f"{name}.{part}" if name else part)


_NORM = re.compile("norm", re.IGNORECASE)
_CALLED = re.compile(r"norm|(?<![a-z])ln(?![a-z])", re.IGNORECASE)
_ENDS_AS_NORM = re.compile(r"norm(ali[sz]ation)?\d*d?$", re.IGNORECASE)  # LayerNorm, BatchNorm2d, GroupNorm32
_NO_NORM = re.compile(r"No[A-Z]?[a-z]*Norm|norm(al(?!i[sz]ation)|ed)", re.IGNORECASE)  # NoNorm, Normalize, NormedLinear


def _claims_to_be_norm(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a name says that this is a norm, and not that it is a block, such as a `ConvNormAct` without its norm."""
    said = [name for name in names if _NORM.search(name) and not _NO_NORM.search(name)]
    block = any(isinstance(part, _ConvNd) for part in module.modules())
    return any(_ENDS_AS_NORM.search(name) or not block for name in said)


def _is_called_norm(module: nn.Module, name: str) -> bool:
    """Whether the attribute that holds a module, or the list that it is in, is called a norm: `norm1`, `ln_f`."""
    if type(module).__module__.startswith("torch.nn."):
        return False  # its class is known, and is no norm
    called = next((part for part in reversed(name.split(".")) if not part.isdecimal()), "")
    return bool(_CALLED.search(called)) and not _NO_NORM.search(called)


def _class_names(module: nn.Module) -> list[str]:
    """Give the names of the module's class and of its bases; none for what is known to be no norm."""
    if isinstance(module, nn.Identity) or type(module).__module__.startswith("torch.nn.utils."):
        return []  # a folded norm; and weight_norm and spectral_norm, which normalise weights
    if getattr(module, "normalises", True) is False:
        return []  # it stands in a norm's place, and says itself that it is none, as DyT does
    if is_scripted(module):
        return [str(module.original_name)]
    return [cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module)]


_WIDTHS = ("hidden_size", "d_model", "embed_dim", "n_embd", "dim")


def expected_width(name: str, around: Sequence[nn.Module]) -> int:
    """Give the number of channels that the modules around a norm let expect, innermost first; 0 where none does.

    >>> attention = nn.MultiheadAttention(8, 2)
    >>> expected_width("attention.norm", [attention]), expected_width("attention.q_norm", [attention])
    (8, 4)
    """
    per_head = bool(re.match(r"(q|k|query|key)_", name.rpartition(".")[2]))
    for module in around:
        for attribute in ("head_dim",) if per_head else _WIDTHS:
            for told in (module, getattr(module, "config", None)):
                width = getattr(told, attribute, None)
                if isinstance(width, int) and width > 1:
                    return width
    return 0


_WIDTHS_OUT = ("out_features", "out_channels", "embedding_dim", "nf", "num_features", "num_channels")
_WIDTHS_IN = ("in_features", "in_channels", "nx", "num_features", "num_channels")


def width_of_neighbours(module: nn.Module, around: Sequence[nn.Module]) -> int:
    """Give the number of channels that comes out of the layer before a norm, or goes into the next; 0 if none tells it.

    Modules usually stand in the order in which they run.

    >>> norm = nn.Identity()
    >>> width_of_neighbours(norm, [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), norm, nn.Linear(8, 2))])
    8
    """
    for holder in around:
        parts = list(holder.modules())
        place = next(number for number, part in enumerate(parts) if part is module)
        for neighbours, names in ((reversed(parts[:place]), _WIDTHS_OUT), (parts[place + 1 :], _WIDTHS_IN)):
            widths = (getattr(part, name, None) for part in neighbours for name in names)
            told = next((width for width in widths if isinstance(width, int) and width > 1), 0)
            if told:
                return told
    return 0


def _first_of(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _complaint(lazy: _Named, unknown: _Named) -> str:
    def listed(modules: _Named) -> list[str]:
        """List them in a line for each class, because a deep model has many of one."""
        names: dict[str, list[str]] = {}
        for name, module in modules:
            names.setdefault(type(module).__name__, []).append(printable(name) or "the model itself")
        return [f"  {_first_of(of_class)} ({cls})" for cls, of_class in names.items()]

    lines = []
    if unknown:
        lines += ["These layers look like norms, but what they compute was not understood. They are left out:"]
        lines += listed(unknown)
        example = f"stabnorm.register_norm({type(unknown[0][1]).__name__}, kind=...)"
        lines += [f"Where one is a norm, register it with {example}; where it is none, leave it out with exclude=."]
    if lazy:
        lines += ["These lazy layers do not know their size yet and are left out. Run one batch first:", *listed(lazy)]
    return "\n".join(lines)
