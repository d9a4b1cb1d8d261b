"""Hooks that gather gradient sums: from gain and bias, or else from the output of a norm.

What is measured is decided at each forward. The gradient of a gain that is trained is the sum that is needed, and
costs nothing. The output is read where there is no such gradient: the norm has no gain, its gain is frozen, or another
module holds the same gain, so that the gradient is that of both. A compiled graph has no hooks on outputs.
"""

import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabnorm._models.hooks import counting_paused, take_off
from stabnorm._models.ranks import Part, is_distributed, own_part
from stabnorm.monitor.accumulators import Accumulators
from stabnorm.monitor.layer_hook import LayerHook, why_not
from stabnorm.norms import NormLayer
from stabnorm.ops.dispatch import one_at_a_time


class GradientHooks:
    """The hooks of all layers of a monitor.

    Args:
        into: the accumulators that they add to.

    Attributes:
        at_outputs: the layers' hooks after a forward.
    """

    def __init__(self, into: Accumulators) -> None:
        self.into = into
        self.at_outputs = [OutputHook(into, index) for index in range(len(into.layers))]
        self._followed: list[tuple[nn.Parameter | None, nn.Parameter | None]] = []
        self._handles: list[RemovableHandle] = []

    def follow(self) -> None:
        """Put hooks on the current gains and biases, because one may be replaced between two steps."""
        now = [(layer.gain_parameter, layer.bias_parameter) for layer in self.into.layers]
        old = self._followed
        if len(old) == len(now) and all(a is c and b is d for (a, b), (c, d) in zip(now, old, strict=True)):
            return
        take_off(self._handles)
        self._followed = now
        holders = _holders(self.into.model)
        for index, (gain, bias) in enumerate(now):
            own = gain is not None and holders.get(id(gain), 1) == 1 and self._hook(index, 0, gain)
            self.at_outputs[index].gain = gain if own else None
            if own and bias is not None and holders.get(id(bias), 1) == 1:
                self._hook(index, 1, bias)

    def _hook(self, index: int, row: int, parameter: nn.Parameter) -> bool:
        """Put a hook on a parameter, also on one that is frozen now; return whether it takes one."""
        if not parameter.is_floating_point() or parameter.is_inference():
            return False
        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # register asks for it
        handle = parameter.register_post_accumulate_grad_hook(ParameterHook(self.into, index, row))
        parameter.requires_grad_(trained)
        self._handles.append(handle)
        hooks: dict[int, Any] = parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
        for key in [key for key in hooks if key != handle.id]:
            hooks[key] = hooks.pop(key)  # ours goes first: another one may step an optimizer and drop the gradient
        return True

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        take_off(self._handles)
        self._followed = []


def _holders(model: nn.Module) -> dict[int, int]:
    """Count the modules that hold each parameter, by its `id`."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


class ParameterHook:
    """Hook after a backward that writes gain times the parameter's accumulated gradient into its row.

    The row is what the parameter's own optimizer step uses: a backward that comes after that step, such as a
    generator's through its critic, changes the row only if another optimizer step follows.

    Under DDP this is the gradient of the rank, before the reduction (with several backwards: the mean so far plus its
    own). FSDP2 calls the hook with the reduced gradient, of which each rank has a shard. The shard is multiplied by the
    number of shards, so that the mean over ranks is the whole gradient.

    It holds the accumulators weakly. A parameter's hooks are out of sight of Python's garbage collector, so a monitor
    that is forgotten would keep its model alive.
    """

    def __init__(self, into: Accumulators, index: int, row: int) -> None:
        self._into, self.index, self.row = weakref.ref(into), index, row
        self._step, self._version = -1, 0  # the step and the parameter's version of the last backward
        self._used: Tensor | None = None  # the row that an optimizer step of this step has used
        self._row: Tensor | None = None  # on the device of the last gradient
        self._plain: type[nn.Module] | None = None  # a class of the module that reads its gain as it is

    def __call__(self, parameter: Tensor) -> None:
        """Read a gradient that was just accumulated."""
        into = self._into()
        if into is None or not into.model.training or into.paused:
            return
        start = time.perf_counter()
        # Gradients are off in a backward, unless it makes a graph; to switch them off once more costs microseconds.
        read = torch.no_grad()(self._read) if torch.is_grad_enabled() else self._read
        with one_at_a_time:
            read(into, parameter)
        into.seconds += time.perf_counter() - start

    def _read(self, into: Accumulators, parameter: Tensor) -> None:
        gradient, layer = parameter.grad, into.layers[self.index]
        if gradient is None:
            into.refuse(self.index, "its gradient was taken away inside the backward, before it could be read")
            return
        gain, row = self._plain_gain(layer), self._row
        if gain is not None and gain.requires_grad and row is not None and _are_like(row, gradient, gain):
            self._begin(into, parameter, row)
            torch.mul(gradient, gain, out=row)  # the same bits as below, in one operation
            return
        if gradient.numel() != parameter.numel() or parameter.numel() != layer.num_features:
            return  # the norm was rebuilt with another width; its input says so
        if self.row == 1 and not _trains(layer.gain_parameter):
            return  # measured at the output
        if row is None or row.device != gradient.device:
            row = self._row = into.gradient(self.index, gradient.device)[self.row]
        self._begin(into, parameter, row)
        if not is_distributed(gradient):
            row.copy_(gradient.flatten())
            if (multiplier := layer.gain) is not None:
                row.mul_(multiplier)
        elif into.merged and (part := own_part(gradient)) is not None:
            row.zero_()
            row[part.start : part.stop] = part.values * part.parts * _gain_of(layer, part)

    def _plain_gain(self, layer: NormLayer) -> Tensor | None:
        """Return the gain if it is the module's own parameter, as `layer.gain` does in several times the time."""
        module, name = layer.module, layer.weight_name
        gain = module._parameters.get(name or "")
        if gain is None or layer.gain_offset or name in vars(module):
            return None
        if type(module) is not self._plain:  # another class may compute what it reads from the parameter
            self._plain = type(module) if layer.gain_parameter is getattr(module, str(name)) else None
        return None if self._plain is None else gain

    def _begin(self, into: Accumulators, parameter: Tensor, row: Tensor) -> None:
        """Keep what an optimizer step has used, and drop what was read at the layer's output."""
        into.read_at_gain(self.index, row.device)
        if self._step != into.steps:
            self._step, self._used = into.steps, None
        elif self._version != parameter._version:
            self._used = row.clone()
            into.on_take.append(lambda: self._settle(parameter, row))
        self._version = parameter._version

    def _settle(self, parameter: Tensor, row: Tensor) -> None:
        if self._used is not None and self._version == parameter._version:  # no optimizer step has used the last one
            row.copy_(self._used)
        self._used = None


def _are_like(row: Tensor, gradient: Tensor, gain: Tensor) -> bool:
    """Whether a gradient and a gain are plain tensors of the row's shape, dtype and device."""
    if type(gradient) is not Tensor or type(gain) is not nn.Parameter:
        return False
    shape, dtype, device = row.shape, row.dtype, row.device
    same = gradient.shape == shape == gain.shape and gradient.dtype is dtype is gain.dtype
    return same and gradient.device == device == gain.device


def _trains(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _gain_of(layer: NormLayer, part: Part) -> Tensor:
    """Return the gain of a shard's channels, whether or not FSDP2 has gathered the whole parameter."""
    weight = layer.gain_parameter
    assert weight is not None  # it was hooked
    if is_distributed(weight):
        own = own_part(weight)
        assert own is not None  # as the gradient's
        return own.values + layer.gain_offset
    return weight.flatten()[part.start : part.stop] + layer.gain_offset


class OutputHook(LayerHook):
    """Called after a forward: gathers the gradient at the output where the gain's is not the sum that is needed.

    Attributes:
        gain: the parameter that a `ParameterHook` reads. Default: None, no parameter is read.
    """

    gain: nn.Parameter | None = None

    def __call__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Put a hook on the output, if it is needed."""
        if torch.compiler.is_compiling() or not isinstance(output, Tensor) or not output.requires_grad:
            return
        layer = self.layer
        read = self.gain
        if read is not None and read.requires_grad and (layer.gain_parameter is read or is_distributed(read)):
            return  # while a sharded module runs, the whole parameter stands in the place of its shards
        if layer.goes_on or counting_paused() or not self.counts(module) or not self.understands(output):
            return
        y = output.detach().clone()  # a copy, because an in-place activation would change it before the backward
        # The values of this forward: it may have run with tensors that are not the module's, or that FSDP frees.
        gain, bias = (None if t is None else t.detach().clone() for t in (layer.gain, layer.bias))
        hook = weakref.ref(self)  # the user may keep the output in the model

        def add(gradient: Tensor) -> None:
            alive = hook()
            if alive is not None:
                alive.add(gradient, y, gain, bias)

        output.register_hook(add)

    @torch.no_grad()
    def add(self, gradient: Tensor, y: Tensor, gain: Tensor | None, bias: Tensor | None) -> None:
        """Add the gradient at an output, unless `autograd.grad` only asks for it.

        Args:
            gradient: at the output.
            y: the output.
            gain: the gain of this forward.
            bias: its bias.
        """
        into, layer = self.into, self.layer
        if self.index in into.at_gain or why_not(layer, gradient) is not None or not _accumulates(into):
            return
        start = time.perf_counter()
        g, y = (layer.rows(t.detach()).float() for t in (gradient, y))
        if bias is not None:
            y = y - bias
        shift = g.sum(0) if gain is None else g.sum(0) * gain
        sums = torch.stack([(g * y).sum(0), shift])
        with one_at_a_time:
            row = into.gradient(self.index, g.device)
            row.copy_(torch.where(row.isnan(), 0, row) + sums)
            into.at_output.add(self.index)
        into.seconds += time.perf_counter() - start


def _accumulates(into: Accumulators) -> bool:
    """Whether the backward that runs adds to gradients, as `.backward()` does and `autograd.grad` does not."""
    task = torch._C._current_graph_task_id()
    if into.backward[0] != task:
        into.backward = task, any(map(_runs, _leaves_below(torch._C._current_autograd_node())))
    return into.backward[1]


def _leaves_below(node: Any) -> Iterable[Any]:
    """The nodes that accumulate gradients of what a node was computed from, nearest first."""
    level, seen = [node], {node}
    while level:
        below = []
        for upper in level:
            for lower, _ in upper.next_functions:
                if lower is None or lower in seen:
                    continue
                seen.add(lower)
                if hasattr(lower, "variable"):
                    yield lower
                else:
                    below.append(lower)
        level = below


def _runs(leaf: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # `autograd.grad` returns its gradient, instead of adding it
        return False
