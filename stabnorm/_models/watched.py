"""Hooks and compiled models: a graph that was made without hooks must not run a module that has some.

Dynamo does not guard the absence of hooks (`torch._dynamo.config.skip_nnmodule_hook_guards`): a hook that is added
after the first compiled call, or to a second instance of a class that was compiled before, never runs, and nothing
says so. What it does guard is the class. So a watched module is of a subclass of its own class, with the same name and
nothing in it, for as long as it is watched: graphs from before do not fit it, and those made meanwhile do not fit it
afterwards. That is one recompile when watching begins, and none when it ends or begins again.
"""

import copyreg
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

StandIn = Callable[[Tensor], Tensor | None]  # what may run in a forward's stead; None: it does not want to


def watch_class(module: nn.Module, stand_in: StandIn | None = None) -> None:
    """Have the module's graphs made anew. Watched by several monitors, it is so several times over.

    Args:
        module: its class is changed.
        stand_in: called with the forward's input in eager mode, in its stead; None from it: the forward runs. It is
            held weakly. None where another stands in already.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return  # never in a graph of Dynamo's
    try:
        module.__class__ = _watched(type(module), stand_in is not None)
        if stand_in is not None:
            _STAND_INS[module] = weakref.ref(stand_in)
    except TypeError:  # a class that wants no subclasses; then a monitor in which no norm runs says so
        return


def unwatch_class(module: nn.Module) -> None:
    """Take one `watch_class` back. A class that somebody else has set in between stays."""
    base = vars(type(module)).get("_watched_class")
    if base is not None:
        if "forward" in vars(type(module)):
            _STAND_INS.pop(module, None)
        module.__class__ = base


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module that may be watched."""
    found = type(module)
    while "_watched_class" in vars(found):
        found = vars(found)["_watched_class"]
    return found


def has_stand_in(module: nn.Module) -> bool:
    """Whether something stands in for its forward."""
    return module in _STAND_INS


_WATCHED: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def _nobody() -> None:
    """In place of a reference."""


_STAND_INS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[StandIn]] = weakref.WeakKeyDictionary()


def _watched(base: Any, stands_in: bool) -> type[nn.Module]:
    if (base, stands_in) in _WATCHED:
        return _WATCHED[base, stands_in]

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """A copy is not watched, and a file must not need this class."""
        self.__class__ = base
        try:
            reduced: Any = self.__reduce_ex__(protocol)
        finally:
            self.__class__ = made
        how, arguments, *rest = reduced
        if how is copyreg.__newobj__:  # type: ignore[attr-defined]  # which pickle takes for the object's own class only
            return object.__new__, (base,), *rest
        return how, arguments, *rest

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        stand_in = None if torch.compiler.is_compiling() else _STAND_INS.get(self, _nobody)()
        y = None if stand_in is None else stand_in(*args, *kwargs.values())
        return base.forward(self, *args, **kwargs) if y is None else y

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    members: dict[str, Any] = {**names, "_watched_class": base, "__reduce_ex__": reduce}
    if stands_in:
        members["forward"] = forward
    made: Any = type(base)(base.__name__, (base,), members)
    return _WATCHED.setdefault((base, stands_in), made)
