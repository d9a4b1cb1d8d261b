"""A mixin that becomes part of the class of a user's own module: names, parameters, hooks and `isinstance` stay valid.

`mixed_in` makes the class; it pickles and copies, which the classes of `torch.nn.utils.parametrize` do not.
`ComputedWeights` is the base of the mixins for which a weight is a function of the parameter. `AddsNorm` is the base of
those that normalise what a module reads or returns.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stabnorm._models.watched import change_class, own_class
from stabnorm.nn._base import Float32Buffers, LeavesFusedPath
from stabnorm.norms import Kind, is_registered, register_norm

_CLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}


class MixedIn(nn.Module):
    """Base of the mixins: what they add to a module, and how it loads a checkpoint from before."""

    _mixed_of: ClassVar[tuple[Any, ...]]  # the mixin, the class it is over, and the names of computed weights
    adds: ClassVar[tuple[str, ...]] = ()  # the parameters, buffers and children that the mixin adds
    adds_to_a_norm: ClassVar[bool] = False  # whether it is over a norm, and returns more than what the norm computes

    def begin(self) -> None:
        """Give first values to what was added, from the parameters as they are."""

    @property
    def computes(self) -> bool:
        """Whether something that inference need not compute again depends on the parameters alone."""
        return any("become_plain" in vars(cls) for cls in type(self).__mro__ if cls is not MixedIn)

    def become_plain(self) -> None:
        """Keep what is computed from the parameters alone, and leave the mixin that computes it."""

    def leave(self, mixin: "type[MixedIn]") -> None:
        """Take off a mixin with all that it has added; the others stay, in their order."""
        stack = _stack_of(self)
        made: type[nn.Module] = stack[-1][1]
        for other, _, weights in reversed(stack):
            made = made if other is mixin else mixed_in(other, made, weights)
        change_class(self, made)
        for added in mixin.adds:
            for table in (self._parameters, self._buffers, self._modules):
                table.pop(added, None)
            vars(self).pop(added, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load a checkpoint from before a mixin, too: what it added then begins with the loaded parameters."""
        beginning = []
        if any(key.startswith(prefix) for key in state_dict):
            for mixin in mixins_of(self):
                added = {prefix + name: tensor for name, tensor in self._tensors_added_by(mixin)}
                if added and not any(name in state_dict for name in added):
                    state_dict.update(added)
                    beginning.append(mixin)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for mixin in reversed(beginning):  # the lowest first, because those above compute with it
            mixin.begin(self)

    def _tensors_added_by(self, mixin: "type[MixedIn]") -> list[tuple[str, Tensor]]:
        state = self.state_dict(keep_vars=True)
        return [(name, t.detach()) for name, t in state.items() if name.partition(".")[0] in mixin.adds]

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        if "_mixed_of" not in vars(type(self)):  # the class of a monitor's watch, which has a way of its own
            return super().__reduce_ex__(protocol)
        stack = _stack_of(self)
        return _blank, (stack[-1][1], *((mixin, weights) for mixin, _, weights in reversed(stack))), self.__dict__


def _stack_of(module: nn.Module) -> list[tuple[type[MixedIn], type[nn.Module], tuple[str, ...]]]:
    """Return what the class of a module was made of, see `mixed_in`, the mixin that was applied last first."""
    return [vars(cls)["_mixed_of"] for cls in type(module).__mro__ if "_mixed_of" in vars(cls)]


def mixins_of(module: nn.Module) -> list[type[MixedIn]]:
    """Return the mixins of a module's class, the one that was applied last first."""
    return [mixin for mixin, _, _ in _stack_of(module)]


def _blank(base: type[nn.Module], *layers: tuple[type[MixedIn], tuple[str, ...]]) -> nn.Module:
    """Create an empty instance of mixins over `base`, for pickle and deepcopy; files know no class that was made."""
    made = base
    for mixin, weights in layers:
        made = mixed_in(mixin, made, weights)
    return made.__new__(made)


def mixed_in(mixin: type[MixedIn], base: type[nn.Module], weights: tuple[str, ...] = ()) -> type[nn.Module]:
    """Return the class of `mixin` over `base`; the same arguments always give the same class.

    Args:
        mixin: the mixin.
        base: the class of a user's module, or one that this function made.
        weights: the names of the parameters that `ComputedWeights.computed` stands before. Default: none.
    """
    mixed_of = (mixin, base, weights)
    if mixed_of not in _CLASSES:
        content: dict[str, Any] = {"__module__": __name__, "__doc__": mixin.__doc__, "_mixed_of": mixed_of}
        content |= {name: _property(mixin, base, name) for name in weights}
        made = _CLASSES[mixed_of] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), content)
        if mixin.adds_to_a_norm and not is_registered(made):  # what it returns does not show that it is a norm
            kinds: dict[type[nn.Module], Kind] = {nn.RMSNorm: "rms", _BatchNorm: "batch"}
            register_norm(made, next((kind for cls, kind in kinds.items() if issubclass(base, cls)), "layer"))
    return _CLASSES[mixed_of]


def mix_in(mixin: type[MixedIn], module: nn.Module, weights: tuple[str, ...] = ()) -> None:
    """Put a mixin over the class of a module, whose hooks and monitors keep working. Arguments as for `mixed_in`."""
    change_class(module, mixed_in(mixin, own_class(module), weights))


def _property(mixin: type[MixedIn], base: type[nn.Module], name: str) -> property:
    """Make the property of a computed weight. What lies below is the parameter, or another computed weight."""
    under = getattr(base, name, None)
    below: Callable[[Any], Any] | None = under.fget if isinstance(under, property) else None
    compute = cast("type[ComputedWeights]", mixin).computed

    def get(self: nn.Module) -> Tensor | None:
        value = self._parameters[name] if below is None else below(self)
        return None if value is None else compute(cast("ComputedWeights", self), name, value)

    return property(get)


class ComputedWeights(MixedIn, Float32Buffers):
    """What reads a weight of the module gets a function of the parameter; state and optimizer keep the parameter.

    The parameter's name is a property of the class, and Python finds it before the parameter. So every reader gets the
    computed weight: the module's own forward, `nn.MultiheadAttention`, and torch's fused encoder layers.
    """

    def _own_buffers(self) -> dict[str, Tensor | None]:
        added = {name for mixin in mixins_of(self) for name in mixin.adds}
        return {name: buffer for name, buffer in self._buffers.items() if name in added}

    def computed(self, name: str, parameter: Tensor) -> Tensor:
        """Return what readers of the weight get, in the precision and shape of the parameter."""
        raise NotImplementedError

    @torch.no_grad()
    def become_plain(self) -> None:
        """Write the computed weights into new parameters."""
        stack = _stack_of(self)
        values = {name: getattr(self, name) for _, _, weights in stack for name in weights}
        for mixin, _, weights in stack:
            if weights:
                self.leave(mixin)
        for name, value in values.items():
            old = self._parameters[name]
            if old is not None:
                self._parameters[name] = nn.Parameter(value.detach().clone(), old.requires_grad)


def materialize(module: nn.Module) -> None:
    """Make plain parameters and constants of what a module computes from its parameters alone; exact."""
    while isinstance(module, MixedIn) and module.computes:
        module.become_plain()


class AddsNorm(MixedIn, LeavesFusedPath):
    """Base of the mixins that normalise what a module reads or returns; the norms are children of the module."""
