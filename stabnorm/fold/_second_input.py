"""A second input made from an example, to follow and to verify a fold on: other values, and another size.

A path that depends on sizes or values differs from the example's: a batch of one that is squeezed, a padding to a
multiple, a factor ``length ** -0.5``, an expert that only other tokens reach. The model says which sizes it takes, by
running on them. A language model that takes a mask also gets one: a norm's shift does not pass what multiplies by it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stabnorm._models.ambient import plain_context
from stabnorm._models.examples import Example

Axis = tuple[int, int]  # a tensor's number in the example, and the axis


class LookUps(TorchDispatchMode):
    """Records what is looked up in tables, such as tokens in an embedding."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.embedding:
            self.read.append((args[1].flatten(), args[0].shape[0]))
        return func(*args, **(kwargs or {}))

    def rows(self, example: Example) -> dict[int, int]:
        """Give the rows of the smallest table that each tensor of an example was looked up in, where there is one."""
        rows: dict[int, int] = {}
        for number, t in enumerate(_tensors(example)):
            sizes = [size for read, size in self.read if read.numel() == t.numel() and torch.equal(read, t.flatten())]
            if sizes and not t.is_floating_point():
                rows[number] = min(sizes)
        return rows


def second_inputs(
    example: Example, rows: Mapping[int, int], takes: Callable[[Example], bool]
) -> tuple[list[Example], bool]:
    """Find other inputs that the model takes, none to two, and say whether their size differs.

    The first has other values and every axis longer or shorter whose size the model lets change. The second is one row
    of a batch.

    Args:
        example: What to start from.
        rows: For the tensors that are looked up in tables, the tables' rows; see `LookUps`.
        takes: Whether the model runs on an input.
    """
    draws: list[Callable[[Example], Example]] = [lambda e: redrawn(e, rows), redrawn, lambda e: e]
    draw = next((draw for draw in draws if takes(draw(example))), draws[-1])
    tensors = _tensors(example)
    batch = next((t.shape[0] for t in tensors if t.ndim), 0)
    rows_axes = {(number, 0) for number, t in enumerate(tensors) if t.ndim and t.shape[0] == batch}
    sizes: dict[Axis, int] = {}
    for axes in (rows_axes, *_axes_of_one_size(tensors)):
        if not sizes.keys() & axes:
            for size in _sizes(tensors, axes):
                wanted = {**sizes, **dict.fromkeys(axes, size)}
                if takes(draw(_resized(example, wanted))):
                    sizes = wanted
                    break
    one_row = dict.fromkeys(rows_axes, 1)
    variants = [sizes, one_row] if batch > 1 and takes(draw(_resized(example, one_row))) else [sizes]
    made = [draw(_resized(example, variant)) for variant in variants]
    return [other for other in made if not _is_same(other, example)], bool(sizes) or len(made) > 1


def padded(model: nn.Module, example: Example, rows: Mapping[int, int]) -> Example:
    """Let the first row of tokens end in a padding, where a forward takes ``attention_mask`` and the example has none.

    Args:
        model: The model.
        example: Its input.
        rows: The tensors that are looked up in tables, see `LookUps`.
    """
    tokens = next((t for number, t in enumerate(_tensors(example)) if number in rows and t.ndim == 2), None)
    forward = inspect.signature(model.forward)
    given = forward.bind_partial(*example.args, **example.kwargs).arguments
    if tokens is None or tokens.shape[1] < 2 or "attention_mask" not in forward.parameters or "attention_mask" in given:
        return example
    mask = torch.ones_like(tokens)
    mask[0, -(tokens.shape[1] // 2) :] = 0
    return Example(example.args, {**example.kwargs, "attention_mask": mask})


def _axes_of_one_size(tensors: Sequence[Tensor]) -> Iterator[set[Axis]]:
    """List sets of axes that may have to change together: all of one size, then those of it at one place."""
    axes: dict[int, set[Axis]] = {}
    for number, t in enumerate(tensors):
        for axis, size in enumerate(t.shape):
            axes.setdefault(size, set()).add((number, axis))
    for group in axes.values():
        places = sorted({axis for _, axis in group})
        yield group
        if len(places) > 1:
            yield from ({(number, axis) for number, axis in group if axis == place} for place in places)


def _sizes(tensors: Sequence[Tensor], axes: set[Axis]) -> list[int]:
    """List the sizes to try. A longer axis may exceed a table, and an index out of bounds ends a CUDA context."""
    if not axes:
        return []
    number, axis = next(iter(axes))
    size = tensors[number].shape[axis]
    is_safe = all(axis == 0 for _, axis in axes) or not any(tensors[number].is_cuda for number, _ in axes)
    longer = [size + 1, 2 * size] if is_safe else []
    return [new for new in (*longer, size - 1, size // 2) if size and new > 0]


@plain_context()
def _resized(example: Example, sizes: Mapping[Axis, int]) -> Example:
    """Cut axes off, or repeat their last entry."""
    if not sizes:
        return example

    def change(number: int, t: Tensor) -> Tensor:
        for axis in range(t.ndim):
            if t.shape[axis] and (number, axis) in sizes:
                kept = torch.arange(sizes[number, axis], device=t.device).clamp(max=t.shape[axis] - 1)
                t = t.index_select(axis, kept)
        return t

    return _mapped(example, change)


@plain_context()
def redrawn(example: Example, rows: Mapping[int, int] | None = None, seed: int = 0) -> Example:
    """Make another input of these shapes: floats with another mean and scale, other tokens.

    Tokens are drawn from their whole table where `rows` knows its size, and shuffled elsewhere. Masks and scalars stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def change(number: int, t: Tensor) -> Tensor:
        if t.is_nested or t.layout != torch.strided or (t.itemsize == 1 and t.is_floating_point()):
            return t  # its elements cannot be drawn anew, or it has no arithmetic, as float8
        if t.is_complex():
            return torch.view_as_complex(change(number, torch.view_as_real(t.resolve_conj())))
        if t.ndim == 0 or not t.numel() or t.dtype == torch.bool or _is_mask(t):
            return t
        if t.is_floating_point():
            finite = t[torch.isfinite(t)].double()
            mean, scale = finite.mean(), finite.std(correction=0)
            scale = scale if scale > 0 else scale + 1
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
            return (mean + 0.7 * scale + 1.6 * scale * noise).to(t.dtype)
        if rows and number in rows:
            return torch.randint(rows[number], t.shape, generator=generator).to(t)
        order = torch.randperm(t.numel(), generator=generator).to(t.device)
        return t.flatten()[order].view(t.shape)

    return _mapped(example, change)


def _is_mask(t: Tensor) -> bool:
    values = torch.unique(t)
    return values.numel() == 2 and bool(((values == 0) | (values == 1) | (values < -1e3)).all())


def _tensors(example: Example) -> list[Tensor]:
    """List the tensors of an example that can be changed, each once."""
    leaves = pytree.tree_leaves((example.args, example.kwargs))
    plain = (t for t in leaves if isinstance(t, Tensor) and not t.is_nested and t.layout == torch.strided)
    return list({id(t): t for t in plain}.values())


def _mapped(example: Example, change: Callable[[int, Tensor], Tensor]) -> Example:
    numbers = {id(t): number for number, t in enumerate(_tensors(example))}
    return example.map(lambda t: change(numbers[id(t)], t) if id(t) in numbers else t)


def _is_same(one: Example, other: Example) -> bool:
    """Whether the two hold the same tensors, not just equal ones."""
    tensors, others = (pytree.tree_leaves((example.args, example.kwargs)) for example in (one, other))
    return all(t is u for t, u in zip(tensors, others, strict=True))


def cast(example: Example, dtype: torch.dtype) -> Example:
    """Convert the floating tensors to another precision."""
    return example.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
