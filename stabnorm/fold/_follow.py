"""Follow the norms' channels through one forward, by a dispatch mode and tag planes (`_shadow`), and write a `Trace`.

A norm's output is tagged with the norm's channels, a linear operation's output with its features. An operation that
meets a tagged tensor is one of these:

- it moves or averages elements: the tags move along;
- it is a linear operation with a Parameter: a reader, and its own features start (`Linear`);
- it multiplies: the scale passes; the shift, too, if the multiplier is a constant;
- it adds features of a linear layer to a stream of norm channels: post-LN's residual (`Residual`);
- it adds a parameter right after a linear operation: that operation's bias;
- it is another norm (`Call`);
- anything else is an obstacle, named by operation and module.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from stabnorm._models.ambient import plain_context
from stabnorm._models.calls import input_name, tensor_input_of
from stabnorm._models.examples import Example, run
from stabnorm._models.hooks import hooked
from stabnorm._models.outputs import Picker, tensors_in
from stabnorm.errors import StabNormError
from stabnorm.fold._branches import Branches
from stabnorm.fold._following import Following, storage_of, tensors_of
from stabnorm.fold._readers import Joined, Linear, NewBias, Operands, Slot, View, new_bias, operands, views_in
from stabnorm.fold._shadow import Shadow, averaged, columns, function_of, moved
from stabnorm.fold._sites import Site
from stabnorm.fold._trace import Call, Obstacle, Residual, Trace, Use
from stabnorm.fold._unreached import note_unreached

aten = torch.ops.aten


def trace_model(
    model: nn.Module,
    sites: Sequence[Site],
    examples: Sequence[Example],
    outputs: Picker,
    given: int | None = None,
    others: str = "",
    tied: Mapping[str, str] | None = None,
) -> Trace:
    """Run the model on the examples and record where its norms' channels go.

    Args:
        model: Its parameters are not tied.
        sites: The norms.
        examples: The inputs.
        outputs: Picks the outputs that matter.
        given: How many of the inputs are the user's own. Default: all.
        others: What the rest are, in words, for what is only seen there. Default: "".
        tied: For each parameter that had a second owner, that owner's name for it. Default: none.
    """
    mode = _Follow(model, sites)
    branches = Branches(mode.tags_of, mode.path, mode.frames)
    with hooked(mode.hooks()):
        for number, example in enumerate(examples):
            mode.on = f", on {others}" if given is not None and number >= given else ""
            with _NormCalls(mode), mode, branches:
                result = run(model, example)
            mode.stop(tensors_in(result, outputs), "the model returns it: name the outputs that matter with outputs=")
    note_unreached(model, mode.trace, mode.frames, tied or {})
    mode.trace.unreached += branches.obstacles()
    return mode.trace


class _NormCalls(TorchFunctionMode):
    """Tells a trace of the functions that normalise activations. A standardized convolution normalises its weight."""

    _NAMES = (
        "layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "local_response_norm",
        "native_layer_norm", "native_batch_norm", "native_group_norm",
    )  # fmt: skip

    def __init__(self, follow: "_Follow") -> None:
        super().__init__()
        self.follow = follow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        follow, kwargs = self.follow, kwargs or {}
        name, path = getattr(func, "__name__", ""), follow.paths[-1]
        counts = name in self._NAMES and not follow.pauses and path not in follow.going_on
        if counts and not follow.is_constant(args[0] if args else kwargs.get("input")):
            follow.trace.functional.setdefault(path, name)
        return func(*args, **kwargs)


class _Follow(Following):
    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__(model)
        self.trace = Trace(sites)
        self.trace.first_tags = [self.trace.new_tags(site.num_features) for site in sites]
        self.features_from = self.trace.next_tag  # tags below are norms' channels
        self.shadows = WeakTensorKeyDictionary()
        self.paths = [""]
        self.frames: dict[str, list[Tensor]] = {}  # the tags that the forward of each called module holds
        self.going_on = {site.name: index for index, site in enumerate(sites) if site.goes_on}
        self.on = ""  # which input this is, where it is not the user's
        self.linear_of_view: dict[View, int] = {}
        self.held = list(model.buffers())  # so that no activation gets the address of a freed buffer
        self.buffers = {storage_of(t): name for name, t in model.named_buffers()}
        self.constant_storages = {*self.owners, *self.buffers}
        self.joined = WeakTensorKeyDictionary()  # by a tensor, the bias that it is
        self.constants = WeakTensorKeyDictionary()  # what was computed from parameters and buffers alone

    # --- modules ---

    def hooks(self) -> Iterator[RemovableHandle]:
        """Register hooks by which modules say when they run, and norms say what they read and tag what they return."""
        sites = {site.name: index for index, site in enumerate(self.trace.sites)}
        for name, module in self.model.named_modules():
            yield module.register_forward_pre_hook(self._entering(name), prepend=True, with_kwargs=True)
            if name in sites and name not in self.going_on:
                reading = self._reading(sites[name], input_name(module))
                yield module.register_forward_pre_hook(reading, with_kwargs=True)
                yield module.register_forward_hook(self._returning(sites[name]))
            yield module.register_forward_hook(self._leaving)

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.paths.append(name)
            self._hold((args, kwargs))

        return hook

    def _leaving(self, module: nn.Module, args: Any, out: Any) -> None:
        self.paths.pop()
        self._hold(out)

    def _hold(self, values: Any) -> None:
        """Note that the forward that runs now holds these values, and may hand them to any of its modules."""
        self.frames.setdefault(self.paths[-1], []).extend(self.tags_of(values))

    def tags_of(self, values: Any) -> list[Tensor]:
        """Give the tags of each tensor among these values."""
        shadows = map(self._shadow, tensors_of(values))
        return [shadow.present for shadow in shadows if shadow is not None and len(shadow.present)]

    def path(self) -> str | None:
        """Give the name of the module that runs; None inside a norm."""
        return None if self.pauses else self.paths[-1]

    def _reading(self, index: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._read(index, tensor_input_of(args, kwargs, name))
            self.pauses += 1  # the operations inside a norm are not followed

        return hook

    def _returning(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self.pauses -= 1
            self._return(index, out)
            axes, read = memory_axes(out), tensors_of(args)
            if axes and read and not read[0].movedim(*axes).is_contiguous():
                self.trace.reordered.setdefault(self.trace.sites[index].name, axes)

        return hook

    @plain_context()
    def _read(self, index: int, x: Tensor) -> None:
        if x.numel():  # an expert's norm, say, may have no token to read
            self.trace.calls.append(self._call(index, x))

    @plain_context()
    def _return(self, index: int, out: Any) -> None:
        site, first = self.trace.sites[index], self.trace.first_tags[index]
        tags = torch.arange(first, first + site.num_features)
        if not isinstance(out, Tensor):
            self.trace.obstacles.append(Obstacle(tags, f"'{site.name}' does not return a tensor"))
        elif out.numel():
            shape = [*site.shape]
            if not shape:
                shape = [1] * out.ndim
                shape[site.channel_dim] = site.num_features
            self.shadows[out] = Shadow(tags.to(out.device).double().view(shape).expand(out.shape))

    def _call(self, index: int, x: Tensor) -> Call:
        site = self.trace.sites[index]
        if not site.fits(x.shape):
            raise StabNormError(
                f"norm '{site.name}' says that it has {site.channels}, but it reads the shape {tuple(x.shape)}. Mend "
                "its fold_affine()"
            )
        none = torch.empty(0, dtype=torch.long)
        raw = Call(index, "raw", none, none, none.double())
        shadow = self.shadows.get(x)
        if site.gain is not None:
            self.stop([x], f"norm '{site.name}' normalises it")
            return raw
        if shadow is None or not bool((shadow.tags > 0).any()):
            return raw
        tags, factors = map(site.flat, (shadow.tags, shadow.factors()))
        channels = torch.arange(len(tags), device=tags.device)[:, None].expand(tags.shape)
        landed = function_of(tags, channels)
        if landed is not None:
            factor_of = function_of(tags, factors)
            factor = torch.full(landed[1].shape, torch.nan) if factor_of is None else factor_of[1]
            if bool((tags >= self.features_from).all()):
                return Call(index, "linear", landed[0], landed[1].long(), factor)
            if len(landed[0]) == len(tags) and bool((tags < self.features_from).all()):
                order = landed[1].argsort()
                return Call(index, "stream", landed[0][order], landed[1][order].long(), factor[order])
        self.stop([x], f"norm '{site.name}' reads it mixed with something else")
        return raw

    # --- operations ---

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Move the tags along, or write down what stops them."""
        inputs, outs = tensors_of((args, kwargs)), tensors_of(out)
        if outs and not any(t.numel() for t in outs):
            return  # nothing is computed: an expert, say, that no token was sent to
        if self.paths[-1] in self.going_on and "batch_norm" in func.overloadpacket.__name__:
            self._read(self.going_on[self.paths[-1]], inputs[0])
            self._return(self.going_on[self.paths[-1]], outs[0])
            return
        self.trace.buffers |= {self.buffers[at] for at in map(storage_of, inputs) if at in self.buffers}
        if any(t.is_nested for t in (*inputs, *outs)):  # tag planes have plain shapes
            self.stop(inputs, f"{self._where(func)} reads it")
            for t in filter(self._is_parameter, inputs):
                self._use(t, None, self._where(func))
            return
        if func._schema.is_mutable and inputs:
            self.constant_storages.discard(storage_of(inputs[0]))  # a buffer that the forward writes is no constant
        parameters = [t for t in inputs if self._is_parameter(t)]
        operands_ = self._linear(func, args, kwargs, out) if parameters else []
        if not operands_ and any(t in self.shadows for t in inputs):
            operands_ = self._pass(func, args, kwargs, out)
        for t in inputs:
            if t in self.joined and not any(t is operand for operand in operands_):
                self.trace.uses += [Use(part, None, self._where(func)) for part in views_in(self.joined[t])]
        joined = self._joined(func, args)
        if joined is not None:
            self.joined[out] = joined
            parameters = []
        aliases = {storage_of(t) for t in outs}  # making a view reads no number
        for t in parameters:
            if storage_of(t) not in aliases and not any(t is operand for operand in operands_):
                self._use(t, None, self._where(func))
        if inputs and all(self.is_constant(t) for t in inputs):
            for t in outs:
                self.constants[t] = True

    def _pass(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Tensor]:
        """Follow an operation without a weight; return the parameter that turns out to be a linear operation's bias."""
        tagged = [t for t in tensors_of((args, kwargs)) if t in self.shadows]
        if func._schema.is_mutable:
            self.stop(tagged, f"{self._where(func)} changes it in place")
            return []
        shadows = moved(func, args, kwargs, self._shadow, out)
        bias: list[Tensor] = []
        if shadows is None:
            shadow = averaged(func, args, kwargs, self._shadow, out) or self._multiplied(func, args, kwargs, out)
            if shadow is not None and func.overloadpacket is aten.sum:
                self.stop(tagged, f"{self._where(func)} adds its shift several times", shift_only=True)
            if shadow is None and func.overloadpacket is aten.add and kwargs.get("alpha", 1) == 1:
                shadow, bias = self._added(func, args[0], args[1], out)
            shadows = None if shadow is None else [shadow]
        if shadows is None:
            why = operands(func, args, kwargs, self._is_parameter)
            self.stop(
                tagged, f"{self._where(func)}: {why}" if isinstance(why, str) else f"{self._where(func)} reads it"
            )
            return []
        for t, shadow in zip(tensors_of(out), shadows, strict=True):
            self.shadows[t] = shadow
        return bias

    def stop(self, tensors: Sequence[Tensor], text: str, *, shift_only: bool = False) -> None:
        """Write an obstacle for whatever is followed in `tensors`."""
        for t in tensors:
            self._stop(self.shadows.get(t), text, shift_only)

    def _stop(self, shadow: Shadow | None, text: str, shift_only: bool = False) -> None:
        if shadow is not None and len(shadow.present):
            self.trace.obstacles.append(Obstacle(shadow.present, text + self.on * (self.on not in text), shift_only))

    def _where(self, func: Any) -> str:
        name = func.overloadpacket.__name__
        return f"{name} in '{self.paths[-1]}'" if self.paths[-1] else f"{name} in the model's own forward"

    def _shadow(self, value: Any) -> Shadow | None:
        shadow: Shadow | None = self.shadows.get(value) if isinstance(value, Tensor) else None
        return shadow

    def _is_parameter(self, value: Any) -> bool:
        return isinstance(value, Tensor) and storage_of(value) in self.owners

    def is_constant(self, value: Any) -> bool:
        """Whether this is a tensor that parameters and buffers alone decide."""
        return isinstance(value, Tensor) and (value in self.constants or storage_of(value) in self.constant_storages)

    # --- what a scale passes ---

    def _multiplied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Shadow | None:
        packet = func.overloadpacket
        if packet is aten.neg:
            x, multiplier = args[0], -1.0
        elif packet is aten.mul or (packet is aten.div and not kwargs.get("rounding_mode")):
            x, multiplier = args[:2]
            if packet is aten.mul and self._shadow(x) is None:
                x, multiplier = multiplier, x
        elif packet is aten.masked_fill and args[2] == 0:
            x, multiplier = args[:2]
        elif packet is aten.where and len(args) == 3 and any(_is_zero(t) for t in args[1:]):
            x, multiplier = args[2] if _is_zero(args[1]) else args[1], args[0]
        else:
            return None
        shadow = self._shadow(x)
        if shadow is None or self._shadow(multiplier) is not None or not out.is_floating_point():
            return None
        tags, factors = shadow.tags.expand(out.shape), shadow.factors()
        is_mask = packet in (aten.masked_fill, aten.where)
        if not is_mask and (not isinstance(multiplier, Tensor) or self.is_constant(multiplier)):
            by = torch.as_tensor(multiplier, dtype=torch.float64, device=tags.device)
            return Shadow(tags, (factors / by if packet is aten.div else factors * by).expand(out.shape))
        self.stop([x], f"{self._where(func)} multiplies it by what depends on the input", shift_only=True)
        return Shadow(tags, None if shadow.factor is None else factors.expand(out.shape))

    def _added(self, func: Any, one: Any, other: Any, out: Tensor) -> tuple[Shadow | None, list[Tensor]]:
        """Give the tags of a sum, and the bias if it adds one; None if neither a residual nor a bias is added."""
        if self._shadow(one) is None:
            one, other = other, one
        shadow, others = self._shadow(one), self._shadow(other)
        if shadow is None:
            return None, []
        if others is None:
            return self._bias_added(shadow, other, out, func)
        shadow, others = (
            Shadow(each.tags.expand(out.shape), None if each.factor is None else each.factor.expand(out.shape))
            for each in (shadow, others)
        )
        if bool((shadow.tags >= self.features_from).any()):
            shadow, others = others, shadow
        is_stream = (shadow.tags > 0) & (shadow.tags < self.features_from)
        pairs = function_of(others.tags, shadow.tags)
        if pairs is None or not bool((is_stream & (others.tags >= self.features_from)).all()):
            return None, []
        self.trace.residuals.append(Residual(pairs[1].long(), pairs[0], self.paths[-1]))
        return shadow, []

    def _bias_added(self, features: Shadow, bias: Any, out: Tensor, func: Any) -> tuple[Shadow | None, list[Tensor]]:
        """Add a parameter to a linear operation's bare output: from here on the sum is the operation's output."""
        view, tags = self.view_of(bias), features.present
        linear = next((n for n in self.trace.linears if len(tags) and n.outputs == tags[0]), None)
        if view is None or linear is None or features.factor is not None or out.shape != features.tags.shape:
            return None, []
        groups, _, outputs = linear.size
        count = groups * outputs
        places = torch.arange(bias.numel(), device=bias.device).view(bias.shape).expand(out.shape)
        landed = function_of(features.tags, places)
        if landed is None or len(tags) != count or bias.numel() != count or bool((landed[1].diff() != 1).any()):
            return None, []
        strided = bias.reshape(groups, outputs)
        slot = View.made(view.name, strided, view.offset)
        if not linear.biased:
            if isinstance(linear.bias, View) or storage_of(strided) != storage_of(bias):
                return None, []
            linear.bare_slot, linear.biased = linear.bias, self.trace.new_tags(count)
            linear.bias, linear.has_bias = slot, True
        elif linear.bias != slot:
            return None, []
        self._use(bias, self.trace.linears.index(linear), self._where(func))
        return Shadow(features.tags - linear.outputs + linear.biased), [bias]

    # --- linear operations ---

    def _linear(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Tensor]:
        """Record a linear operation, tag its output, and return its parameters; none if it is no such operation."""
        operation = operands(func, args, kwargs, self._is_parameter)
        view = self.view_of(operation.form) if isinstance(operation, Operands) and out.numel() else None
        if view is None or not isinstance(operation, Operands) or view.is_expanded:
            return []
        index, first = self._index_of(func, view, operation, out)
        linear = self.trace.linears[index]
        groups, inputs, outputs = linear.size
        shadow = self._shadow(operation.x)
        if shadow is None:
            nothing = torch.zeros(groups, inputs)
            read = columns(Shadow(nothing.double()), lambda plane: plane[..., None])
        else:
            features = torch.where(shadow.tags < self.features_from, 0.0, shadow.tags)
            self._stop(Shadow(features), f"{linear} reads it")
            read = columns(Shadow(shadow.tags - features, shadow.factor), operation.gather, self.on)
            if read.problem:
                self._stop(Shadow(shadow.tags - features), f"{linear}: {read.problem}")
        linear.note(read)
        tags = first + torch.arange(groups * outputs, dtype=torch.float64, device=out.device)
        self.shadows[out] = Shadow(operation.spread(tags.view(groups, outputs)).expand(out.shape))
        self._hold(out)
        where = self._where(func)
        self._use(operation.weight, index, where)
        if operation.bias is None:
            return [operation.weight]
        self.stop([operation.bias], f"{linear} adds it to its own output")
        for part in views_in(linear.bias):
            self.trace.uses.append(Use(part, index, where))
        return [operation.weight, *([operation.bias] if views_in(linear.bias) else [])]

    def _index_of(self, func: Any, view: View, operation: Operands, out: Tensor) -> tuple[int, int]:
        """Give the number of a linear operation, and the first tag of its outputs: with its bias, or before it."""
        slot = self._slot(view, operation, out)
        count = view.size[0] * view.size[2]
        if view not in self.linear_of_view:
            first, name = self.trace.new_tags(count), func.overloadpacket.__name__
            linear = Linear(name, self.paths[-1], view, first, slot, operation.bias is not None, operation.pads)
            self.trace.linears.append(linear)
            self.linear_of_view[view] = len(self.trace.linears) - 1
        index = self.linear_of_view[view]
        linear = self.trace.linears[index]
        linear.pads = linear.pads or operation.pads
        if linear.biased and operation.bias is not None and slot == linear.bias:
            return index, linear.biased  # at another size torch adds the bias in the product itself
        if not linear.biased and isinstance(linear.bias, View) and operation.bias is None:
            linear.bare_slot, linear.biased, linear.outputs = slot, linear.outputs, self.trace.new_tags(count)
        if slot != (linear.bare_slot if linear.biased else linear.bias):
            linear.problem = "it is used in two ways"
        return index, linear.outputs

    def _joined(self, func: Any, args: tuple[Any, ...]) -> Joined | None:
        """Give the bias that an operation joins from vectors that are parameters or buffers; None if it does not."""
        if func.overloadpacket is not aten.cat or any(t.ndim != 1 or not t.numel() for t in args[0]):
            return None
        parts = [self.view_of(t) or self._buffer(t) for t in args[0]]
        known = [part for part in parts if part is not None]
        return Joined(tuple(known)) if len(known) == len(parts) and any(isinstance(p, View) for p in known) else None

    def _buffer(self, t: Tensor) -> NewBias | None:
        """Give the place of a parameter that could stand for this buffer."""
        for name, buffer in self.model.named_buffers():
            if buffer is t:
                owner, _, attribute = name.rpartition(".")
                return NewBias(owner, attribute, t.numel(), 0)
        return None

    def _slot(self, view: View, operation: Operands, out: Tensor) -> Slot:
        if operation.bias is None:
            return new_bias(self.model, view, self.paths[-1])
        if operation.bias in self.joined:
            fits = view.size[0] == 1 and operation.bias.numel() == view.size[2]
            return self.joined[operation.bias] if fits else "its bias is not one number for each output"
        bias = self.view_of(operation.bias)
        if bias is None:
            return "its bias is computed, not a Parameter"
        groups, outputs = view.size[0], view.size[2]
        picked = operation.pick(operation.align(operation.bias).expand(out.shape))
        slot = View.made(bias.name, picked, bias.offset)
        if operation.bias.numel() != groups * outputs or slot.is_expanded:
            return "its bias is not one number for each output"
        return slot

    # --- parameters ---

    def _use(self, t: Tensor, linear: int | None, text: str) -> None:
        view = self.view_of(t)
        if view is not None:
            self.trace.uses.append(Use(view, linear, text))


def memory_axes(t: Any) -> tuple[int, int] | None:
    """Give the axis that is innermost in memory, and the last one; (0, 0) where t is contiguous, None for other memory.

    >>> memory_axes(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    (1, 3)
    """
    if not isinstance(t, Tensor) or t.layout != torch.strided or not t.ndim:
        return None
    innermost = min(range(t.ndim), key=lambda axis: t.stride(axis) if t.shape[axis] > 1 else t.numel() + 1)
    candidates = [(0, 0), (innermost, t.ndim - 1)]
    return next((axes for axes in candidates if t.movedim(*axes).is_contiguous()), None)


def _is_zero(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and not bool(value)
