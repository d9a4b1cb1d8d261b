"""Examples: what the user passes to run a model with, a second input made from them, and the tensors in an output."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Example:
    """One set of arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Any) -> "Example":
        """The same with every tensor changed."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, self.kwargs))
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
    with torch.inference_mode(False), torch.no_grad(), _plain_attention():
        return model(*example.args, **example.kwargs)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
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
        if t.ndim == 0 or t.dtype == torch.bool or _is_mask(t):
            return t
        if t.is_floating_point():
            finite = t[torch.isfinite(t)].double()
            mean, scale = finite.mean(), finite.std(correction=0)
            scale = scale if scale > 0 else scale + 1
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
            return (mean + 0.7 * scale + 1.6 * scale * noise).to(t.dtype)
        if t.is_complex():
            return t
        order = torch.randperm(t.numel(), generator=generator).to(t.device)
        return t.flatten()[order].view(t.shape)

    return example.map(change)


def _is_mask(t: Tensor) -> bool:
    values = torch.unique(t)
    return values.numel() == 2 and bool(((values == 0) | (values == 1) | (values < -1e3)).all())


def cast(example: Example, dtype: torch.dtype) -> Example:
    """Floating tensors in another precision."""
    return example.map(lambda t: t.to(dtype) if t.is_floating_point() else t)


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors in an output, whatever containers or objects hold them."""
    return list(_walk(output, set()))


def _walk(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        inside: Any = value.values()
    elif isinstance(value, list | tuple | set):
        inside = value
    else:
        inside = vars(value).values() if hasattr(value, "__dict__") else ()
    for part in inside:
        yield from _walk(part, seen)
