"""The order of a model's norms by depth, and the layers that feed them, from the autograd graph of one forward.

The graph only has operations that pass a gradient. An argmax, a detach or a custom kernel without a backward hides a
connection. Two norms on its two sides may then seem independent, and an additional reader of a feeder is not seen.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stabnorm._models.calls import input_name, input_of
from stabnorm._models.hooks import hooked
from stabnorm._models.outputs import tensors_in
from stabnorm._models.tree import Tree
from stabnorm.errors import StabNormError
from stabnorm.fit.feed import WIDEST, Feeder
from stabnorm.fit.watch import Runner
from stabnorm.norms import NormLayer


@dataclass(frozen=True)
class Order:
    """The result of `order_of`.

    Args:
        levels: the names of the norms that ran, by depth: a norm's level comes after the levels of all norms whose
            output it depends on.
        feeders: the linear layer or the embedding tables whose sum is a norm's input, for each norm that is the only
            reader of this sum.
    """

    levels: list[list[str]]
    feeders: dict[str, Feeder]


@dataclass
class _Calls:
    """The graph nodes of a module's inputs and outputs, call by call, and the shapes of the outputs."""

    reads: list[Any]
    writes: list[Any]
    shapes: list[torch.Size]


def order_of(model: nn.Module, layers: Sequence[NormLayer], batch: Any, run: Runner) -> Order:
    """Run the model once on a batch, with gradients.

    Raises:
        StabNormError: the model does not run on the batch.
    """
    producers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding) and not parametrize.is_parametrized(module)
    }
    calls: dict[str, _Calls] = {}
    modules = {layer.name: layer.module for layer in layers} | {f"feeds {name}": m for name, m in producers.items()}
    hooks = (
        m.register_forward_hook(_hook(calls, name, input_name(m)), with_kwargs=True) for name, m in modules.items()
    )
    wanted_gradients = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in wanted_gradients:
            parameter.requires_grad_(parameter.is_floating_point())
        with hooked(hooks), torch.enable_grad(), run.prepared(model, batch) as prepared:
            output = _output(model, prepared, run)
    finally:
        for parameter, wanted in wanted_gradients:
            parameter.requires_grad_(wanted)
    norms = {name: nodes for name, nodes in calls.items() if not name.startswith("feeds ")}
    produced = {name.removeprefix("feeds "): nodes for name, nodes in calls.items() if name.startswith("feeds ")}
    readers = _readers([t.grad_fn for t in tensors_in(output)])
    unshared = _unshared(model, {name: producers[name] for name in produced})
    by_name = {layer.name: layer for layer in layers}
    feeders = {}
    for name, nodes in norms.items():
        over_last_axis = by_name[name].channel_dim == -1 and by_name[name].feature_dims == 1
        feeder = _feeder(nodes, produced, producers, readers) if over_last_axis else None
        if feeder is not None and set(feeder.names) <= unshared:
            feeders[name] = feeder
    return Order(_levels(norms), feeders)


def _output(model: nn.Module, batch: Any, run: Runner) -> Any:
    try:
        return run.forward(model, batch)
    except Exception as error:
        raise StabNormError(
            f"{type(model).__name__} does not run on the loader's first batch, a {type(batch).__name__}: "
            f"{type(error).__name__}: {error}. Pass forward=lambda model, batch: ..., or batches that it takes"
        ) from error


def _hook(calls: dict[str, _Calls], name: str, argument: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = input_of(args, kwargs, argument)
        if isinstance(x, Tensor) and isinstance(output, Tensor):
            nodes = calls.setdefault(name, _Calls([], [], []))
            nodes.reads.append(x.grad_fn)
            nodes.writes.append(output.grad_fn)
            nodes.shapes.append(output.shape)

    return hook


def _unshared(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of those that have one place in the model and share no weight with another module."""
    tree = Tree(model)
    return {
        name
        for name, module in modules.items()
        if tree.shared(module) is None and len(tree.parents.get(id(module), ())) == 1
    }


# --- depth ---


def _levels(norms: Mapping[str, _Calls]) -> list[list[str]]:
    writers = {written: name for name, nodes in norms.items() for written in nodes.writes if written is not None}
    depths: dict[str, int] = {}
    for name, nodes in norms.items():  # in the order of their first calls
        before = {writers[node] for node in _reached(nodes.reads) if node in writers} - {name}
        depths[name] = 1 + max((depths[other] for other in before if other in depths), default=-1)
    levels: list[list[str]] = [[] for _ in range(max(depths.values(), default=-1) + 1)]
    for name, depth in depths.items():
        levels[depth].append(name)
    return levels


def _reached(nodes: Sequence[Any], stop: Any = None) -> set[Any]:
    """Return these nodes and all nodes that they were computed from, but not those that `stop` was computed from."""
    todo = [node for node in nodes if node is not None]
    visited = set(todo)
    while todo:
        node = todo.pop()
        if node is stop:
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                todo.append(following)
    return visited


# --- feeders ---


def _readers(roots: Sequence[Any]) -> Counter[Any]:
    """Count how often each node is read by another node or is an output of the model."""
    count = Counter(node for node in roots if node is not None)
    for node in _reached(roots):
        count.update(following for following, _ in node.next_functions if following is not None)
    return count


def _feeder(
    norm: _Calls, produced: Mapping[str, _Calls], producers: Mapping[str, nn.Module], readers: Counter[Any]
) -> Feeder | None:
    """Return the layers whose sum is the norm's input; None if something else reads the sum, too."""
    if len(norm.reads) != 1 or norm.reads[0] is None:
        return None
    read, written = norm.reads[0], norm.writes[0]
    inside = _reached([written], stop=read) - {read}
    if readers[read] != sum(following is read for node in inside for following, _ in node.next_functions):
        return None
    makers = {nodes.writes[0]: name for name, nodes in produced.items() if len(nodes.writes) == 1}
    added, todo = [], [read]
    while todo:
        node = todo.pop()
        if node is not read and readers[node] != 1:
            continue
        if node in makers:
            added.append(makers[node])
        elif type(node).__name__ == "AddBackward0" and node._saved_alpha == 1:
            todo += [following for following, _ in node.next_functions if following is not None]
    return _linear(norm, produced, producers, added) or _tables(norm, produced, producers, added)


def _linear(
    norm: _Calls, produced: Mapping[str, _Calls], producers: Mapping[str, nn.Module], added: Sequence[str]
) -> Feeder | None:
    """Return the widest linear layer among the summands that has the same tokens as the norm."""
    widths = {name: part.in_features for name in added if isinstance(part := producers[name], nn.Linear)}
    usable = {name: n for name, n in widths.items() if produced[name].shapes[0] == norm.shapes[0] and n <= WIDEST}
    return Feeder("linear", (max(usable, key=lambda name: usable[name]),)) if usable else None


def _tables(
    norm: _Calls, produced: Mapping[str, _Calls], producers: Mapping[str, nn.Module], added: Sequence[str]
) -> Feeder | None:
    """Return the embedding tables among the summands, longest first; one may give one sequence for the whole batch."""
    lengths = {name: part.num_embeddings for name in added if isinstance(part := producers[name], nn.Embedding)}
    shapes, shape = {name: produced[name].shapes[0] for name in lengths}, norm.shapes[0]
    usable = [name for name in lengths if shapes[name] == shape[len(shape) - len(shapes[name]) :]]
    return Feeder("embedding", tuple(sorted(usable, key=lambda name: -lengths[name]))) if usable else None
