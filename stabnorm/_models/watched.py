"""Watch the calls of a user's modules, while the modules look as if nobody watched them.

A module that is watched belongs to a subclass of its own class, of the same name, whose `__call__` tells the watchers.
Hooks of `nn.Module` would do the same, but they change what other code does with the module:

* Torch's fused paths for eval, `torch.jit.script` and `fold_norms` look at a module's hooks, and do something else.
* A copy or a pickle has the hooks, too. A copy of a watched module is of the original class, and nobody watches it.
* Dynamo does not guard the absence of hooks (`torch._dynamo.config.skip_nnmodule_hook_guards`). A hook that is added
  after the first compiled call, or to a second instance of a class that was compiled before, never runs, and no error
  says so. Dynamo does guard the class: graphs from before do not fit a watched module, and graphs made meanwhile do not
  fit it afterwards. That costs one recompilation when watching begins, and none when it ends or begins again.

The watchers stand in the module's `__dict__`, where Dynamo can follow them. Hooks are used after all where a class
cannot be subclassed, and where the module has pre-hooks already, because these may change the input that we read.
"""

import copyreg
from abc import ABCMeta
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from stabnorm._models.hooks import Hook, take_off

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]
StandIn = Callable[..., Any]

_WATCHERS = "_stabnorm_watchers"


class Watcher(NamedTuple):
    """What is told about the calls of a module.

    Attributes:
        before: called with module, positional and keyword arguments.
        after: called with module, positional and keyword arguments, and output.
        at_error: whether `after` is also called, with None for the output, if the call fails in eager mode.
        stand_in: runs in the place of the module's forward in eager mode, with the module and all arguments.
    """

    before: Before | None = None
    after: After | None = None
    at_error: bool = False
    stand_in: StandIn | None = None


class Watching:
    """A module's watcher at work; `remove` ends it, as that of a hook's handle does.

    Args:
        module: the module. Its class is changed.
        watcher: what is told.
    """

    def __init__(self, module: nn.Module, watcher: Watcher) -> None:
        self.module, self.watcher = module, watcher
        self._handles: list[Any] = []
        self._told = watcher
        if module._forward_pre_hooks:
            self._register_hooks()
            self._told = Watcher()  # nothing: the class is there for copies and files of the module
        watched = _watched(type(module))
        if watched is not None and _set_class(module, watched):
            vars(module)[_WATCHERS] = (*vars(module).get(_WATCHERS, ()), self._told)
        elif not self._handles:
            self._register_hooks()

    def _register_hooks(self) -> None:
        before, after, at_error, _ = self.watcher
        if before is not None:
            self._handles.append(self.module.register_forward_pre_hook(_BeforeHook(before), with_kwargs=True))
        try:
            if after is not None:
                self._handles.append(
                    self.module.register_forward_hook(_AfterHook(after), with_kwargs=True, always_call=at_error)
                )
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Stop watching. A class that somebody else has set in between stays, and then watches nothing."""
        take_off(self._handles)
        module = self.module
        if _WATCHERS not in vars(module):
            return
        left = list(vars(module)[_WATCHERS])
        if self._told in left:
            left.remove(self._told)  # not by identity: torch.export builds a module's tuples anew
        vars(module)[_WATCHERS] = tuple(left)
        if not left and own_class(module) is not type(module):
            _set_class(module, own_class(module))
            del vars(module)[_WATCHERS]


def own_class(module: nn.Module) -> type[nn.Module]:
    """Give the class that the module has while nobody watches it."""
    cls = type(module)
    own: type[nn.Module] = vars(cls).get("_watched_class", cls)
    return own


def change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Give a module another class of its own; who watches it goes on watching.

    Raises:
        TypeError: objects of the two classes have another layout.
    """
    watched = None if own_class(module) is type(module) else _watched(to)
    module.__class__ = to if watched is None else watched


def has_stand_in(module: nn.Module) -> bool:
    """Whether something stands in for the module's forward."""
    return any(watcher.stand_in is not None for watcher in vars(module).get(_WATCHERS, ()))


def is_exported() -> bool:
    """Whether this call is traced to be exported: then nothing of ours may get into what is exported."""
    return torch._C._get_tracing_state() is not None or _is_exporting()


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


class _BeforeHook(Hook):
    def __init__(self, before: Before) -> None:
        self.before = before

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_exported():
            self.before(module, args, kwargs)


class _AfterHook(Hook):
    def __init__(self, after: After) -> None:
        self.after = after

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not is_exported():
            self.after(module, args, kwargs, output)


class _Watched:
    """What a watched class has beside its base."""

    _watched_class: type[nn.Module]

    def __init_subclass__(cls) -> None:
        """Tell the base nothing: it may keep a list of its subclasses, or allow none."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watchers: tuple[Watcher, ...] = self._stabnorm_watchers  # type: ignore[attr-defined]
        if is_exported():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        for watcher in watchers:
            if watcher.before is not None:
                watcher.before(self, args, kwargs)  # type: ignore[arg-type]
        if torch.compiler.is_compiling():
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        else:
            output = _call(self, super().__call__, watchers, args, kwargs)  # type: ignore[misc]
        for watcher in watchers:
            if watcher.after is not None:
                watcher.after(self, args, kwargs, output)  # type: ignore[arg-type]
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Describe the module as if nobody watched it: a file needs no class of ours, and a copy is not watched."""
        made, base = type(self), vars(type(self)).get("_watched_class")
        if base is None:  # somebody has made a class of ours, which does not watch
            reduced: Any = super().__reduce_ex__(protocol)
        else:
            self.__class__ = base
            try:
                reduced = self.__reduce_ex__(protocol)
            finally:
                self.__class__ = made
        how, arguments, *rest = reduced
        if base is not None and how is copyreg.__newobj__:  # type: ignore[attr-defined]
            how, arguments = object.__new__, (base,)  # pickle takes the other one for the present class only
        if rest and isinstance(rest[0], Mapping):
            rest[0] = _without_hooks({name: value for name, value in rest[0].items() if name != _WATCHERS})
        return how, arguments, *rest


def _without_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """Leave our hooks out of a module's attributes, and what torch keeps beside them under their numbers."""
    tables = {name: table for name, table in state.items() if "_hooks" in name and isinstance(table, dict)}
    ours = {key for table in tables.values() for key, hook in table.items() if isinstance(hook, Hook)}
    for name, table in tables.items() if ours else ():
        left = type(table)()
        left.update((key, value) for key, value in table.items() if key not in ours)
        state[name] = left
    return state


def _call(
    module: Any, call: Callable[..., Any], watchers: tuple[Watcher, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module in eager mode."""
    stand_in = next((watcher.stand_in for watcher in watchers if watcher.stand_in is not None), None)
    if stand_in is not None:
        vars(module)["forward"] = lambda *args, **kwargs: stand_in(module, *args, **kwargs)
    try:
        return call(*args, **kwargs)
    except BaseException:
        for watcher in watchers:
            if watcher.at_error and watcher.after is not None:
                watcher.after(module, args, kwargs, None)
        raise
    finally:
        if stand_in is not None:
            vars(module).pop("forward", None)


_MADE: dict[type[nn.Module], type[nn.Module] | None] = {}


def _watched(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Give the watched class of a class; None where there can be none."""
    if "_watched_class" in vars(cls):
        return cls
    if cls not in _MADE:
        _MADE[cls] = _make_watched(cls)
    return _MADE[cls]


def _make_watched(base: Any) -> Any:
    # A metaclass of the user's own may keep a list of its classes, as a class may keep one of its subclasses.
    if type(base) not in (type, ABCMeta) or issubclass(base, torch.jit.ScriptModule):
        return None
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    try:
        return type(base)(base.__name__, (_Watched, base), names | {"_watched_class": base})
    except Exception:  # there may be any reason, and hooks do it, too
        return None


def _set_class(module: nn.Module, cls: type[nn.Module]) -> bool:
    try:
        module.__class__ = cls
    except Exception:  # it refuses another class
        return False
    return type(module) is cls
