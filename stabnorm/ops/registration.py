"""Register Python functions as ops of PyTorch's dispatcher: in a compiled graph each one is one opaque node."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")
_library = torch.library.Library("stabnorm", "FRAGMENT")


def returns_nothing(*_: object) -> None:
    """The fake implementation of an op that only changes its arguments."""


def define(name: str, like: Callable[..., Any], run: Callable[..., Any], mutates: Sequence[str], fake: Any) -> Any:
    """Define the op ``stabnorm::<name>`` and return it.

    Args:
        name: name of the op.
        like: a function whose annotations give the schema.
        run: the function that the op runs.
        mutates: names of the arguments that it changes in place.
        fake: returns empty tensors of the results' shapes and dtypes.
    """
    _library.define(name + torch.library.infer_schema(like, mutates_args=mutates))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stabnorm::{name}", fake)
    return getattr(torch.ops.stabnorm, name).default


def registered(fake: Callable[..., Any]) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Register a function of a backend. Eager calls run the function; compiled graphs call the op."""

    def register(run: Callable[_P, _T]) -> Callable[_P, _T]:
        node = define(run.__name__, run, run, (), fake)

        @functools.wraps(run)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if torch.compiler.is_compiling():
                return node(*args, **kwargs)  # type: ignore[no-any-return]
            return run(*args, **kwargs)

        return call

    return register
