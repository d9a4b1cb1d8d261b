"""Examples: what the user passes to run a model with, a second input made from them, and the tensors in an output."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Picker = Callable[[Any], Any] | None  # `fold_norms`' `outputs`


@dataclass(frozen=True)
class Example:
    """One set of arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Example":
        """The same with every tensor changed; what was one tensor twice still is."""
        changed: dict[int, Tensor] = {}

        def once(t: Tensor) -> Tensor:
            if id(t) not in changed:
                changed[id(t)] = change(t)
            return changed[id(t)]

        args, kwargs = pytree.tree_map_only(Tensor, once, (self.args, self.kwargs))
        return Example(args, kwargs)


def read_examples(name: str, given: Any) -> list[Example]:
    """What the user passed as `name`, as a list.

    Raises:
        TypeError: it is none of the formats.
        ValueError: it is an empty list.
    """
    if isinstance(given, list):
        if not given:
            raise ValueError(f"{name}=[] holds no input. Pass at least one")
        return [read_example(name, one) for one in given]
    return [read_example(name, given)]


def read_example(name: str, given: Any) -> Example:
    if isinstance(given, Tensor):
        return Example((given,), {})
    if isinstance(given, tuple):
        if len(given) == 2 and isinstance(given[0], tuple) and isinstance(given[1], dict):
            return Example(*given)
        return Example(given, {})
    if isinstance(given, Mapping):
        return Example((), dict(given))
    raise TypeError(
        f"{name} is a {type(given).__name__}. Pass a tensor, a tuple of positional arguments, a dict of keyword "
        "arguments, a tuple (args, kwargs), or a list of these"
    )


def run(model: nn.Module, example: Example) -> Any:
    """The model's output on clones of the example, without gradients and without torch's fused encoder layers."""
    example = example.map(torch.clone)
    with torch.inference_mode(False), torch.no_grad(), without_fused_layers():
        return model(*example.args, **example.kwargs)


@contextlib.contextmanager
def without_fused_layers() -> Iterator[None]:
    """Torch's encoder layers have a fast path that reads their norms' parameters behind their back."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def redrawn(example: Example, seed: int = 0) -> Example:
    """Another input of these shapes: floats with another mean and scale, integers shuffled, masks and scalars kept."""
    generator = torch.Generator().manual_seed(seed)

    def change(t: Tensor) -> Tensor:
        if t.is_nested or t.layout != torch.strided or (t.itemsize == 1 and t.is_floating_point()):
            return t  # has no elements to draw anew, or, of float8, no arithmetic
        if t.is_complex():
            return torch.view_as_complex(change(torch.view_as_real(t.resolve_conj())))
        if t.ndim == 0 or not t.numel() or t.dtype == torch.bool or _is_mask(t):
            return t
        if t.is_floating_point():
            finite = t[torch.isfinite(t)].double()
            mean, scale = finite.mean(), finite.std(correction=0)
            scale = scale if scale > 0 else scale + 1
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
            return (mean + 0.7 * scale + 1.6 * scale * noise).to(t.dtype)
        order = torch.randperm(t.numel(), generator=generator).to(t.device)
        return t.flatten()[order].view(t.shape)

    return example.map(change)


def is_same(one: Example, other: Example) -> bool:
    """Whether the two hold the same tensors, not just equal ones."""
    tensors, others = (pytree.tree_leaves((example.args, example.kwargs)) for example in (one, other))
    return all(t is u for t, u in zip(tensors, others, strict=True))


def _is_mask(t: Tensor) -> bool:
    values = torch.unique(t)
    return values.numel() == 2 and bool(((values == 0) | (values == 1) | (values < -1e3)).all())


def first_rows(example: Example, count: int) -> Example:
    """The same with fewer rows, where all tensors have as many."""
    rows = {t.shape[0] if t.ndim else 0 for t in tensors_in((example.args, example.kwargs))}
    return example.map(lambda t: t[:count].clone()) if len(rows) == 1 else example


def cast(example: Example, dtype: torch.dtype) -> Example:
    """Floating tensors in another precision."""
    return example.map(lambda t: t.to(dtype) if t.is_floating_point() else t)


class OutputError(ValueError):
    """The model runs, but what it returns cannot be looked at."""


def tensors_in(output: Any, outputs: Picker = None) -> list[Tensor]:
    """All tensors in an output, or in what `outputs` picks of it, whatever containers or objects hold them.

    Arrays and floats count: they were tensors.

    Raises:
        OutputError: `outputs` fails, or there is an iterator, which looking at would use up.
    """
    try:
        output = outputs(output) if outputs else output
    except Exception as error:
        raise OutputError(
            f"outputs= fails on what the model returns, a {type(output).__name__}: {type(error).__name__}: {error}"
        ) from error
    return list(_walk(output, {}))


def _walk(value: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    if isinstance(value, float):
        yield torch.tensor(value, dtype=torch.float64)
        return
    if id(value) in seen or isinstance(value, nn.Module | type):
        return
    seen[id(value)] = value  # held: another could take its place
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fc":
        yield torch.tensor(value.astype(np.complex128 if value.dtype.kind == "c" else np.float64))
    elif isinstance(value, Iterator):
        raise OutputError(
            f"the model returns a {type(value).__name__}, and looking at what it yields would use it up. Return a "
            "list, or name the outputs that matter with outputs="
        )
    else:
        for part in _inside(value):
            yield from _walk(part, seen)


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, Sequence | Set | collections.deque) and not isinstance(value, str | bytes | range):
        return value
    if isinstance(value, np.ndarray):
        return value.flat if value.dtype == object else ()
    slots = [name for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name) for name in slots)]


def _slots(cls: type) -> Iterable[str]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots
