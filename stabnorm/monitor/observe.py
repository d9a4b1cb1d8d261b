"""Hooks that add the raw moments of each norm's input to the accumulators.

A hook only calls one op on its layer's row. It computes no statistic and reads nothing back. `Accumulators.take`
returns what the hooks of one optimizer step gathered, and `Observer.discard` starts the next step.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabnorm._log import logger
from stabnorm._models.devices import device_of
from stabnorm._models.ranks import is_distributed
from stabnorm._models.watched import unwatch_class, watch_class
from stabnorm.functional.detail import DetailMoments
from stabnorm.monitor.accumulators import Accumulators, LayerHook
from stabnorm.monitor.details import INPUT_NEEDS, Details
from stabnorm.monitor.fused import FusedNorm, can_fuse
from stabnorm.monitor.gradient_hooks import OutputHook, ParameterHook
from stabnorm.norms import NormLayer
from stabnorm.ops.detail import accumulate_detail_, count_outliers_
from stabnorm.ops.moments import accumulate_moments_


class Observer:
    """The hooks on the norms of a model, which fill accumulators.

    Args:
        into: the accumulators; the hooks are put on their layers.
        gradients: whether to gather gradient sums, too.
        details: gathers what the costlier statistics need. Default: nothing more is gathered.
    """

    def __init__(self, into: Accumulators, *, gradients: bool, details: Details | None = None) -> None:
        self.into, self.gradients, self.details = into, gradients, details
        self._handles: list[RemovableHandle] = []
        self._hooks: list[_InputHook] = []
        self._parameters: list[
            tuple[nn.Parameter | None, bool, nn.Parameter | None, bool]
        ] = []  # what gradients were hooked
        self._gradient_handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are registered."""
        return bool(self._handles)

    def attach(self) -> None:
        """Register one forward hook per norm; gradients come from the parameters where a norm has some."""
        needs = frozenset[str]() if self.details is None else self.details.needs
        for index, layer in enumerate(self.into.layers):
            if self.details is not None and needs & INPUT_NEEDS:
                hook: _InputHook = _DetailedInputHook(self.into, index, self.device, self.details)
            else:
                hook = _InputHook(self.into, index, self.device)
            self._hooks.append(hook)
            watch_class(layer.module, hook.fused)
            self._handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
            if self.details is not None and "outputs" in needs:
                self._handles.append(layer.module.register_forward_hook(_OutlierHook(hook, self.details)))
        self.discard()

    def detach(self) -> None:
        """Remove all hooks."""
        for layer in self.into.layers if self.attached else ():
            unwatch_class(layer.module)
        for handle in (*self._handles, *self._gradient_handles):
            handle.remove()
        for kept in (self._handles, self._gradient_handles, self._hooks, self._parameters):
            kept.clear()

    def discard(self) -> None:
        """Discard what was gathered since the last step."""
        self.into.clear()
        if self.details is not None:
            self.details.discard()
        if self.gradients and self._handles:
            self._follow_parameters()

    @property
    def device(self) -> torch.device:
        """The device on which the first norm runs or will run."""
        if self._hooks:
            return self._hooks[0].account.seen.device
        return device_of(self.into.layers[0].module, self.into.model)

    def _follow_parameters(self) -> None:
        """Put hooks on the current gains and biases, because one may be frozen or replaced between two steps."""
        now = [
            (gain, gain is not None and gain.requires_grad, bias, bias is not None and bias.requires_grad)
            for gain, bias in ((layer.gain_parameter, layer.bias_parameter) for layer in self.into.layers)
        ]
        same = len(now) == len(self._parameters) and all(
            a is c and b == d and e is g and f == h
            for (a, b, e, f), (c, d, g, h) in zip(now, self._parameters, strict=True)
        )
        if same:
            return
        for handle in self._gradient_handles:
            handle.remove()
        self._gradient_handles = [
            handle for index, layer in enumerate(self.into.layers) for handle in self._watch_gradients(index, layer)
        ]
        self._parameters = now

    def _watch_gradients(self, index: int, layer: NormLayer) -> Iterable[RemovableHandle]:
        """Register hooks for gradient sums. The gradient of a parameter is this sum already, and costs nothing."""
        gain, bias = layer.gain_parameter, layer.bias_parameter
        if gain is None or not gain.requires_grad:
            yield layer.module.register_forward_hook(OutputHook(self.into, index))
            return
        yield gain.register_post_accumulate_grad_hook(ParameterHook(self.into, index, 0))
        if bias is not None and bias.requires_grad:
            yield bias.register_post_accumulate_grad_hook(ParameterHook(self.into, index, 1))


class _InputHook(LayerHook):
    """Forward pre-hook that adds the moments of a norm's input to its row."""

    def __init__(self, into: Accumulators, index: int, device: torch.device) -> None:
        super().__init__(into, index)
        # Allocated now and not at the first forward, because a compiled graph holds on to it.
        parameter = next(self.layer.module.parameters(), None)
        self.account = into.account(index, device if parameter is None else parameter.device)
        self.refused = False
        self.fused: FusedNorm | None = None
        if into.fused and can_fuse(self.layer):
            self.fused = FusedNorm(into, self.layer, self.add)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.fused is not None and not torch.compiler.is_compiling():
            self.fused.forget()
        if not self.into.model.training:
            return
        if torch.compiler.is_compiling():  # a checkpoint's graph must not change our attributes
            self.observe(module, args, kwargs)
            return
        start = time.perf_counter()
        self.observe(module, args, kwargs)
        self.into.seconds += time.perf_counter() - start

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = self.layer
        x = layer.input_of(args, kwargs)
        why_not = self.not_understood(x)
        if why_not is not None:
            if not self.refused and not torch.compiler.is_compiling():
                logger.warning("norm %s is not counted: %s", layer.name, why_not)
                self.refused = True
            return
        valid = layer.valid(x)
        if self.account.seen.device != x.device:
            self.account = self.into.account(self.index, x.device)
        fused = None if torch.compiler.is_compiling() else self.fused
        if fused is None or not fused.take(module, x, valid, self.account):
            self.add(x, valid)
        self.observe_more(x.detach(), valid)

    @torch.no_grad()
    def add(self, x: Tensor, valid: Tensor | None) -> None:
        """Add the moments of an input to the layer's row."""
        layer, account = self.layer, self.account
        compiling = torch.compiler.is_compiling()
        op = torch.ops.stabnorm.accumulate_moments_.default if compiling else accumulate_moments_
        op(
            x.detach(), valid, account.seen, account.channel, account.token, layer.kind, layer.channel_dim,
            layer.feature_dims, layer.groups, layer.eps, self.into.tokens, self.into.normalized,
            self.nothing_yet(),
        )  # fmt: skip

    def observe_more(self, x: Tensor, valid: Tensor | None) -> None:
        """Gather more from this input, in a subclass."""

    def nothing_yet(self) -> bool:
        """Whether the accumulator is known to be empty; that can only be read without a sync on a CPU."""
        if torch.compiler.is_compiling() or self.account.seen.device.type != "cpu":
            return False
        return not self.account.seen.numpy().any()  # NumPy, to save a torch operation

    def not_understood(self, x: Any) -> str | None:
        """Return why this input cannot be counted. This is no error, because the norm itself may accept it."""
        if not isinstance(x, Tensor) or x.is_nested or not x.is_floating_point():
            return f"its input is {'a nested or integer tensor' if isinstance(x, Tensor) else type(x).__name__}"
        if x.device.type == "meta":
            return "its input is on the meta device"
        if is_distributed(x):
            return "its input is a DTensor, of which every process has a part or a copy"
        layer = self.layer
        if x.ndim < max(layer.feature_dims, -layer.channel_dim, layer.channel_dim + 1):
            return f"its input has {x.ndim} axes"
        channels = (
            x.shape[x.ndim - layer.feature_dims :].numel() if layer.feature_dims > 1 else x.shape[layer.channel_dim]
        )
        if channels != layer.num_features:
            return f"its input has {channels} channels and it was built for {layer.num_features}"
        if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
            return "it runs inside a torch.func transform"
        return None


class _DetailedInputHook(_InputHook):
    """Forward pre-hook that also adds the detail moments of a norm's input to its row."""

    def __init__(self, into: Accumulators, index: int, device: torch.device, details: Details) -> None:
        super().__init__(into, index, device)
        self.details = details
        self.detail = details.slabs.account(index, self.account.seen.device)

    @torch.no_grad()
    def observe_more(self, x: Tensor, valid: Tensor | None) -> None:
        layer, details = self.layer, self.details
        if self.detail.seen.device != x.device:
            self.detail = details.slabs.account(self.index, x.device)
        compiling = torch.compiler.is_compiling()
        op = torch.ops.stabnorm.accumulate_detail_.default if compiling else accumulate_detail_
        op(
            x, valid, *self.detail, layer.channel_dim, layer.feature_dims, layer.eps, "token_shape" in details.needs,
            "values" in details.needs, "sequences" in details.needs,
        )  # fmt: skip


class _OutlierHook(LayerHook):
    """Forward hook that adds the outliers of a norm's output to the detail row of its input hook."""

    def __init__(self, of_input: _InputHook, details: Details) -> None:
        super().__init__(of_input.into, of_input.index)
        self.of_input, self.details = of_input, details
        self.detail = self.row(of_input.account.seen.device)

    def row(self, device: torch.device) -> DetailMoments:
        """Return the input hook's own row, because a graph that gets two views would write to only one of them."""
        of_input = self.of_input
        if isinstance(of_input, _DetailedInputHook) and of_input.detail.seen.device == device:
            return of_input.detail
        return self.details.slabs.account(self.index, device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        compiling = torch.compiler.is_compiling()
        if not self.into.model.training or self.of_input.not_understood(output) is not None:
            return
        start = 0.0 if compiling else time.perf_counter()
        if self.detail.seen.device != output.device:
            self.detail = self.row(output.device)
        op = torch.ops.stabnorm.count_outliers_.default if compiling else count_outliers_
        layer, valid = self.layer, self.layer.valid(output)
        with torch.no_grad():
            op(output.detach(), valid, self.detail.counts, self.detail.outputs, layer.channel_dim, layer.feature_dims)
        if not compiling:
            self.into.seconds += time.perf_counter() - start
