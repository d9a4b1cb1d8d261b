"""The layers, embeddings and parameters whose sum the norms read: those that write a residual stream.

Tags are channels here, counted from 1. A tensor also has the set of writers of which it is the sum. Only operations
that treat all channels alike keep it: movement, averages, sums with other streams, multiplication by a number. Any
other operation needs the stream unchanged, so its writers get a problem.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from stabnorm._models.calls import input_name, tensor_input_of
from stabnorm._models.examples import Example, run
from stabnorm._models.hooks import hooked
from stabnorm._models.outputs import Picker, tensors_in
from stabnorm.fold._following import Following, tensors_of
from stabnorm.fold._readers import Operands, View, operands
from stabnorm.fold._shadow import ZERO, Shadow, averaged, moved

aten = torch.ops.aten


@dataclass(eq=False)
class Writer:
    """Parameters that write channels: weight ``[groups, inputs, channels, *kernel]``, bias ``[groups, channels]``."""

    name: str
    weight: View
    bias: View | None
    problem: str = ""


@dataclass
class Streams:
    """What a forward shows: writers, the norms that read each set of them, and the norms that read something else."""

    writers: list[Writer] = field(default_factory=list)
    reads: list[tuple[str, frozenset[int]]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


def find_streams(model: nn.Module, norms: Sequence[str], examples: Sequence[Example], outputs: Picker) -> Streams:
    """Run the model and record what the named norms read; their channels are on the last axis."""
    mode = _FollowStreams(model)
    with hooked(mode.hooks(norms)):
        for example in examples:
            with mode:
                result = run(model, example)
            mode.stop(tensors_in(result, outputs), "the model returns it")
    return mode.streams


class _FollowStreams(Following):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.streams = Streams()
        self.stream = WeakTensorKeyDictionary()  # tensor -> (Shadow, frozenset of writers)
        self.index_of: dict[View, int] = {}

    def hooks(self, norms: Sequence[str]) -> Iterator[RemovableHandle]:
        """Register hooks by which the named norms say what they read and when they are done."""
        for name in norms:
            module = self.model.get_submodule(name)
            yield module.register_forward_pre_hook(self._reading(name, input_name(module)), with_kwargs=True)
            yield module.register_forward_hook(self._returning)

    def _reading(self, name: str, argument: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = tensor_input_of(args, kwargs, argument)
            self.pauses += 1
            if x not in self.stream:
                self.streams.problems[name] = "it reads more than a sum of linear layers and embeddings"
                return
            shadow, writers = self.stream[x]
            channels = torch.arange(1, x.shape[-1] + 1, device=x.device)
            if not bool(((shadow.tags == channels) | (shadow.tags == ZERO)).all()):
                self.streams.problems[name] = "it reads more than a sum of linear layers and embeddings"
                self._blame(writers, f"norm '{name}' reads it mixed with something else")
            self.streams.reads.append((name, writers))

        return hook

    def _returning(self, module: nn.Module, args: Any, out: Any) -> None:
        self.pauses -= 1

    def stop(self, tensors: Sequence[Tensor], why: str) -> None:
        """Record that something needs the streams in `tensors` unchanged."""
        for t in tensors:
            if t in self.stream:
                self._blame(self.stream[t][1], why)

    def _blame(self, writers: frozenset[int], why: str) -> None:
        for index in writers:
            self.streams.writers[index].problem = self.streams.writers[index].problem or why

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note what the operation writes to a stream, or does with one."""
        inputs = tensors_of((args, kwargs))
        followed = [t for t in inputs if t in self.stream]
        where = func.overloadpacket.__name__
        if any(t.is_nested for t in (*inputs, *tensors_of(out))):
            self.stop(followed, f"{where} reads it without a norm")
            return
        operation = operands(func, args, kwargs, lambda t: self.view_of(t) is not None)
        if isinstance(operation, Operands):
            self.stop(followed, f"{where} reads it without a norm")
            self._written(operation, out)
            return
        if func.overloadpacket is aten.embedding and self.view_of(args[0]) is not None:
            self._add_writer(out, args[0][None], None, torch.arange(1, out.shape[-1] + 1, device=out.device))
            return
        if not followed:
            return
        if func.overloadpacket in (aten.add, aten.cat):
            self._take_in_parameters(inputs, self.stream[followed[0]][0])
        writers = frozenset().union(*(self.stream[t][1] for t in inputs if t in self.stream))
        shadows = None if func._schema.is_mutable else self._passed(func, args, kwargs, out)
        if shadows is None:
            self._blame(writers, f"{where} reads it without a norm")
            return
        for t, shadow in zip(pytree.tree_leaves(out), shadows, strict=True):
            self.stream[t] = (shadow, writers)

    def _passed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Shadow] | None:
        shadows = moved(func, args, kwargs, self._shadow, out)
        if shadows is not None:
            return shadows
        average = averaged(func, args, kwargs, self._shadow, out)
        if average is not None:
            return [average]
        one, other = (*args[:2], None)[:2]
        shadow, others = self._shadow(one), self._shadow(other)
        if func.overloadpacket in (aten.mul, aten.div) and shadow and isinstance(other, int | float):
            return [shadow]
        if func.overloadpacket is aten.add and shadow and others:
            sums = torch.broadcast_tensors(shadow.tags, others.tags)
            return [Shadow(sums[0])] if torch.equal(*sums) else None
        return None

    def _take_in_parameters(self, inputs: Sequence[Tensor], like: Shadow) -> None:
        """Record as writers the parameters that are added to a stream or joined to it: positions, a class token."""
        channels = torch.arange(1, like.tags.shape[-1] + 1, device=like.tags.device)
        for t in inputs:
            view = self.view_of(t)
            if t not in self.stream and view is not None and t.shape[-1] == len(channels):
                whole = self.model.get_parameter(view.name)
                if whole.shape[-1] == len(channels) and whole.is_contiguous():
                    self._add_writer(t, whole.detach().view(1, -1, len(channels)), None, channels)

    def _written(self, operation: Operands, out: Tensor) -> None:
        groups, _, outputs = operation.form.shape[:3]
        bias = None
        if operation.bias is not None:
            picked = operation.pick(operation.align(operation.bias).expand(out.shape))
            bias = self.view_of(picked)
            if bias is None:
                return
        if groups == 1:  # a mean over the outputs of several groups is not one group's
            channels = operation.spread(torch.arange(1.0, outputs + 1, device=out.device)[None])
            self._add_writer(out, operation.form, bias, channels)

    def _add_writer(self, out: Tensor, form: Tensor, bias: View | None, channels: Tensor) -> None:
        view = self.view_of(form)
        assert view is not None
        if view not in self.index_of:
            self.index_of[view] = len(self.streams.writers)
            self.streams.writers.append(Writer(view.name, view, bias))
        index = self.index_of[view]
        if self.streams.writers[index].bias != bias:
            self.streams.writers[index].problem = "it is used in two ways"
        self.stream[out] = (Shadow(channels.double().expand(out.shape)), frozenset([index]))

    def _shadow(self, value: Any) -> Shadow | None:
        stream = self.stream.get(value) if isinstance(value, Tensor) else None
        return None if stream is None else stream[0]
