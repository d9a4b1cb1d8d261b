"""The tensors in what a model returns."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Picker = Callable[[Any], Any] | None  # picks the outputs that matter, as `outputs=` of `fold_norms`


class OutputError(ValueError):
    """The model runs, but what it returns cannot be looked at."""


def tensors_in(output: Any, outputs: Picker = None) -> list[Tensor]:
    """List the tensors in an output, or in what `outputs` picks of it, whatever containers or objects hold them.

    Arrays and floats count, because they were tensors.

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
        yield torch.tensor(value, dtype=torch.float64, device="cpu")
        return
    if id(value) in seen or isinstance(value, nn.Module | type):
        return
    seen[id(value)] = value  # held: another could take its place
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fc":
        yield torch.from_numpy(np.array(value, dtype=np.complex128 if value.dtype.kind == "c" else np.float64))
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
