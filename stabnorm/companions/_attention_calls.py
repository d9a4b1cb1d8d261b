"""Read the queries and keys of an attention without changing the code of its module.

While a watch is attached, `scaled_dot_product_attention` and `softmax` of `torch.nn.functional` are thin functions that
show their arguments to the innermost watched module that is running, if one is, and call the original with what they
got. Hooks of the watched modules say which one is running. Detaching the last watch puts the originals back.

Why this, and not a `TorchFunctionMode` for the duration of a module's forward: the mode stops at
`F.multi_head_attention_forward`, which it sees as one call; Dynamo cannot trace some tensor methods while a mode is on
(`Tensor.unflatten`, which many attentions call, breaks the graph); and it slows every op in the module down, not one.
The price: a name that a module bound before, as in `from torch.nn.functional import scaled_dot_product_attention`, has
to be found and replaced where it is, which is done for the modules that define the model's classes.

Dynamo takes `F.multi_head_attention_forward` into its graph without looking inside, but looks inside a copy of it.
"""

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Viewer(Protocol):
    """A watched attention module, which adds its calls to the sums."""

    module: nn.Module

    def see_call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Read a call of `scaled_dot_product_attention`."""

    def see_softmax(
        self, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> None:
        """Read a call of `softmax`."""


class _Running(threading.local):
    """The watched modules whose forward runs in this thread, outermost first; a plain list, which Dynamo can follow."""

    def __init__(self) -> None:
        self.viewers: list[Viewer] = []


_running = _Running()
_attached: set[int] = set()  # watches, by id
_replaced: list[tuple[dict[str, Any], str, Any]] = []


def enter(viewer: Viewer) -> None:
    """Note that the viewer's module begins its forward."""
    _running.viewers.append(viewer)


def leave(viewer: Viewer) -> None:
    """Note that the forward of the viewer's module has returned or raised."""
    viewers = _running.viewers
    viewers[:] = [running for running in viewers if running is not viewer]  # Dynamo of torch 2.6 knows no remove


def _innermost() -> list[Viewer]:
    """Return the viewers of the innermost running module; there are two if two monitors watch it."""
    viewers = _running.viewers
    return [viewer for viewer in viewers if viewer.module is viewers[-1].module]


_attention, _softmax, _multi_head = F.scaled_dot_product_attention, F.softmax, F.multi_head_attention_forward


@functools.wraps(_attention)
def _shown_attention(*args: Any, **kwargs: Any) -> Tensor:
    for viewer in _innermost():
        viewer.see_call(*args, **kwargs)
    return _attention(*args, **kwargs)


@functools.wraps(_softmax)
def _shown_softmax(*args: Any, **kwargs: Any) -> Tensor:
    for viewer in _innermost():
        viewer.see_softmax(*args, **kwargs)
    return _softmax(*args, **kwargs)


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__ = __name__
    return copy


_SHOWN: dict[Any, Any] = {_attention: _shown_attention, _softmax: _shown_softmax, _multi_head: _copy(_multi_head)}


def attach(watch: object, classes: Iterable[type]) -> None:
    """Register a watch, which then sees the calls of modules of these classes."""
    _attached.add(id(watch))
    namespaces = {id(space): space for space in (vars(F), *map(_namespace, classes))}
    for space in namespaces.values():
        for name, value in list(space.items()):
            shown = _SHOWN.get(value) if isinstance(value, types.FunctionType | types.BuiltinFunctionType) else None
            # Our own, where the originals are kept, stays.
            if shown is not None and space is not globals():
                space[name] = shown
                _replaced.append((space, name, value))


def detach(watch: object) -> None:
    """Unregister a watch; the last one restores the originals."""
    _attached.discard(id(watch))
    if not _attached:
        for space, name, original in _replaced:
            if space.get(name) is _SHOWN[original]:  # else other code has replaced the function
                space[name] = original
        _replaced.clear()


def _namespace(of: type) -> dict[str, Any]:
    return vars(sys.modules.get(of.__module__, F))
