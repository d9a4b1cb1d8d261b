"""The one format of an example: the arguments that a model is run with.

An *example* holds a model's arguments and nothing else:

- a tensor is the one positional argument: ``model(example)``;
- a tuple holds positional arguments: ``model(*example)``;
- a mapping holds keyword arguments: ``model(**example)``;
- a 2-tuple of a tuple and a dict holds both: ``model(*example[0], **example[1])``;
- a list holds several examples, each in one of these formats.

It is run on the device that its tensors are on. `fold_norms`, `fold_gains`, `to_pre_rms`, `plan_fold` and
``FoldCallback(example=)`` read examples. What reads a loader reads *batches*, in which a tuple holds targets, too: see
`stabnorm._models.batches`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stabnorm._checks import wrong_type
from stabnorm._models.fast_path import without_fused_layers
from stabnorm._models.outputs import tensors_in


@dataclass(frozen=True)
class Example:
    """One set of arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Example":
        """Change every tensor; a tensor that occurs twice is changed once, and still occurs twice."""
        changed: dict[int, Tensor] = {}

        def once(t: Tensor) -> Tensor:
            if id(t) not in changed:
                changed[id(t)] = change(t)
            return changed[id(t)]

        args, kwargs = pytree.tree_map_only(Tensor, once, (self.args, self.kwargs))
        return Example(args, kwargs)


def read_examples(name: str, given: Any) -> list[Example]:
    """Read what the user passed as the argument `name`.

    Raises:
        TypeError: it has none of the formats.
        ValueError: it is an empty list.

    >>> [example.args for example in read_examples("example", [torch.zeros(1), ("x", "y")])]
    [(tensor([0.]),), ('x', 'y')]
    """
    if isinstance(given, list):
        if not given:
            raise ValueError(f"{name}=[] holds no input. Pass at least one")
        return [_read_example(name, one) for one in given]
    return [_read_example(name, given)]


def _read_example(name: str, given: Any) -> Example:
    if isinstance(given, Tensor):
        return Example((given,), {})
    if isinstance(given, tuple):
        if len(given) == 2 and isinstance(given[0], tuple) and isinstance(given[1], dict):
            return Example(*given)
        return Example(given, {})
    if isinstance(given, Mapping):
        return Example((), dict(given))
    wanted = "a tensor, a tuple of positional arguments, a dict of keyword arguments, a tuple (args, kwargs), or a list"
    raise wrong_type(name, given, f"{wanted} of these")


def run(model: nn.Module, example: Example) -> Any:
    """Run the model on clones of the example, without gradients and without torch's fused encoder layers."""
    example = example.map(torch.clone)
    with torch.inference_mode(False), torch.no_grad(), without_fused_layers():
        return model(*example.args, **example.kwargs)


def first_rows(example: Example, count: int) -> Example:
    """Keep the first rows of an example, where all its tensors have as many rows; else keep it whole."""
    rows = {t.shape[0] if t.ndim else 0 for t in tensors_in((example.args, example.kwargs))}
    return example.map(lambda t: t[:count].clone()) if len(rows) == 1 else example
