"""Hooks that come off whatever happens, and hooks of which a copy of the model gets nothing."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Hook:
    """Base of the hooks that stay on a model: in a copy or a pickle of the model a function that does nothing stands.

    Without it a copy of the model would copy whatever the hook refers to, such as a monitor with all it has gathered.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_inert, ()


def inert(*_: object) -> None:
    """Stand in for a `Hook` in a copy of its model."""


def _make_inert() -> Callable[..., None]:
    return inert


class _Counting:
    """Whether hooks count what they see, in eager mode and in compiled graphs."""

    paused = False


@contextmanager
def uncounted() -> Iterator[None]:
    """Let models run without being counted by any of our hooks, which stay on.

    A hook that was taken off instead would be missing in a graph that is compiled meanwhile.
    """
    before, _Counting.paused = _Counting.paused, True
    try:
        yield
    finally:
        _Counting.paused = before


def counting_paused() -> bool:
    """Whether `uncounted` is open; a compiled graph asks this inside a custom op, at run time."""
    return _Counting.paused


@contextmanager
def hooked(registrations: Iterable[Any]) -> Iterator[None]:
    """Keep hooks on while the context is open; they come off whatever happens, also when a registration fails.

    Args:
        registrations: a generator that registers the hooks one after the other, and yields what removes them.

    >>> model, widths = nn.Identity(), []
    >>> with hooked(part.register_forward_hook(lambda *call: widths.append(call[2])) for part in [model]):
    ...     model(3)
    3
    >>> widths, len(model._forward_hooks)
    ([3], 0)
    """
    handles: list[Any] = []
    try:
        for handle in registrations:
            handles.append(handle)
        yield
    finally:
        take_off(handles)


def take_off(handles: list[Any]) -> None:
    """Remove these hooks, or whatever else has `remove`, and empty the list."""
    for handle in handles:
        handle.remove()
    handles.clear()


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a forward hook is on the module that does something."""
    return any(hook is not inert for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))


def drop_inert_hooks(module: nn.Module) -> None:
    """Remove what stands for our hooks in a copy."""
    for name, hooks in vars(module).items():
        if "_hooks" in name and isinstance(hooks, dict):
            for key in [key for key, hook in hooks.items() if hook is inert]:
                del hooks[key]
