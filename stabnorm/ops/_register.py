"""Ops of PyTorch's dispatcher whose bodies are Python functions: in a compiled graph each is one opaque node."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")
_library = torch.library.Library("stabnorm", "FRAGMENT")


def registered(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Register the body as an op of this schema. What is called is the body, and in a compiled graph the op."""

    def register(body: Callable[_P, _T]) -> Callable[_P, _T]:
        name = body.__name__
        _library.define(name + schema)
        _library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"stabnorm::{name}", fake)
        op = getattr(torch.ops.stabnorm, name).default

        @functools.wraps(body)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if torch.compiler.is_compiling():
                return op(*args, **kwargs)  # type: ignore[no-any-return]
            return body(*args, **kwargs)

        return call

    return register
