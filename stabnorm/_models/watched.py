"""Watched classes: they force recompilation, so that no compiled graph without hooks runs a module that has some.

Dynamo does not guard the absence of hooks (`torch._dynamo.config.skip_nnmodule_hook_guards`). A hook that is added
after the first compiled call, or to a second instance of a class that was compiled before, never runs, and no error
says so. Dynamo does guard the class. So a module that is watched belongs to an empty subclass of its own class, with
the same name: graphs from before do not fit it, and graphs made meanwhile do not fit it afterwards. That costs one
recompilation when watching begins, and none when it ends or begins again.
"""

import copyreg
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._models.calls import input_of

StandIn = Callable[[Tensor], Tensor | None]  # runs in a forward's place; None from it: the forward has to run


def watch_class(module: nn.Module, stand_in: StandIn | None = None) -> None:
    """Force recompilation of graphs that contain this module. Calls nest, one per monitor.

    Args:
        module: its class is changed.
        stand_in: called with the forward's input in eager mode, in the forward's place; where it returns None, the
            forward runs. It is held weakly. Pass None where another one stands in already. Default: None.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return  # Dynamo never puts it into a graph
    try:
        module.__class__ = _watched(type(module), stand_in is not None)
        if stand_in is not None:
            _STAND_INS[module] = weakref.ref(stand_in)
    except TypeError:  # the class allows no subclass; if then no norm runs, the monitor says so
        return


def unwatch_class(module: nn.Module) -> None:
    """Undo one `watch_class` call. A class that somebody else has set in between stays."""
    base = vars(type(module)).get("_watched_class")
    if base is not None:
        if "forward" in vars(type(module)):
            _STAND_INS.pop(module, None)
        module.__class__ = base


def own_class(module: nn.Module) -> type[nn.Module]:
    """Give the class that the module has while nobody watches it."""
    cls = type(module)
    while "_watched_class" in vars(cls):
        cls = vars(cls)["_watched_class"]
    return cls


def has_stand_in(module: nn.Module) -> bool:
    """Whether something stands in for the module's forward."""
    return module in _STAND_INS


_WATCHED: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def _no_stand_in() -> None:
    """Stand-in for a dead or missing weak reference."""


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
        if how is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle takes it for the object's own class only
            return object.__new__, (base,), *rest
        return how, arguments, *rest

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        stand_in = None if torch.compiler.is_compiling() else _STAND_INS.get(self, _no_stand_in)()
        y = None if stand_in is None else stand_in(input_of(args, kwargs))
        return base.forward(self, *args, **kwargs) if y is None else y

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    members: dict[str, Any] = {**names, "_watched_class": base, "__reduce_ex__": reduce}
    if stands_in:
        members["forward"] = forward
    made: Any = type(base)(base.__name__, (base,), members)
    return _WATCHED.setdefault((base, stands_in), made)
