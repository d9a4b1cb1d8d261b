"""Register Python functions as ops of PyTorch's dispatcher: in a compiled graph each one is one opaque node."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, get_type_hints

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")
_library = torch.library.Library("stabnorm", "FRAGMENT")


def returns_nothing(*_: object) -> None:
    """The fake implementation of an op that only changes its arguments."""


class _Arguments:
    """The arguments of a function, with the fields of each named tuple as arguments of their own.

    The dispatcher knows no named tuples. The field `mean` of the argument `tokens` becomes the argument `tokens_mean`.
    """

    def __init__(self, like: Callable[..., Any]) -> None:
        signature = inspect.signature(like)
        self.fields: dict[str, list[str]] = {}  # the new names, by argument
        self._kinds: list[type | None] = []  # the named tuple of each argument
        flat: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            kind = parameter.annotation if hasattr(parameter.annotation, "_fields") else None
            hints = {parameter.name: parameter.annotation} if kind is None else get_type_hints(kind)
            names = list(hints) if kind is None else [f"{parameter.name}_{field}" for field in hints]
            self.fields[parameter.name] = names
            self._kinds.append(kind)
            flat += [parameter.replace(name=n, annotation=hint) for n, hint in zip(names, hints.values(), strict=True)]
        self.has_tuples = any(self._kinds)

        def prototype() -> None: ...

        prototype.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
        self.prototype = prototype

    def taken_by(self, run: Callable[..., _T]) -> Callable[..., _T]:
        """Return a function of the flat arguments that calls `run` with the named tuples."""

        def call(*flat: Any) -> _T:
            values = iter(flat)
            return run(*[next(values) if kind is None else _filled(kind, values) for kind in self._kinds])

        return call if self.has_tuples else run

    def given_to(self, node: Callable[..., _T]) -> Callable[..., _T]:
        """Return a function of the named tuples that calls `node` with the flat arguments."""

        def call(*args: Any) -> _T:
            return node(*[part for arg in args for part in (arg if isinstance(arg, tuple) else (arg,))])

        return call if self.has_tuples else node


def _filled(kind: Any, values: Any) -> Any:
    return kind(*[next(values) for _ in kind._fields])


def define(name: str, like: Callable[..., Any], run: Callable[..., Any], mutates: Sequence[str], fake: Any) -> Any:
    """Define the op ``stabnorm::<name>`` and return it.

    Args:
        name: name of the op.
        like: a function whose annotations give the schema. An argument may be a named tuple; then no argument has a
            default, and all are passed by position.
        run: the function that the op runs.
        mutates: names of the arguments that it changes in place.
        fake: returns empty tensors of the results' shapes and dtypes.
    """
    arguments = _Arguments(like)
    changed = [field for argument in mutates for field in arguments.fields[argument]]
    _library.define(name + torch.library.infer_schema(arguments.prototype, mutates_args=changed))
    flat_run = arguments.taken_by(run)
    if fake is returns_nothing:
        names = list(inspect.signature(arguments.prototype).parameters)
        flat_run = _unversioned(flat_run, {names.index(field) for field in changed})
    _library.impl(name, flat_run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stabnorm::{name}", arguments.taken_by(fake))
    return arguments.given_to(getattr(torch.ops.stabnorm, name).default)


def _unversioned(run: Callable[..., None], changed: set[int]) -> Callable[..., None]:
    """Let an op that only changes its arguments do so behind autograd's back.

    A checkpoint in a compiled graph saves what goes into it, accumulators as well, and autograd refuses a saved tensor
    that was changed. No gradient depends on what such an op changes. The accumulators of all layers share one version.
    """

    def call(*args: Any) -> None:
        run(*(arg.data if i in changed and arg is not None else arg for i, arg in enumerate(args)))

    return call


def registered(fake: Callable[..., Any]) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Register a function as an op. Eager calls run the function; compiled graphs call the op."""

    def register(run: Callable[_P, _T]) -> Callable[_P, _T]:
        node = define(run.__name__, run, run, (), fake)

        @functools.wraps(run)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if torch.compiler.is_compiling():
                return node(*args, **kwargs)  # type: ignore[no-any-return]
            return run(*args, **kwargs)

        return call

    return register
