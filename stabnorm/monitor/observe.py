"""Hooks that add the raw moments of each norm's input to the accumulators.

A hook only calls one op on its layer's row. It computes no statistic and reads nothing back. `Accumulators.take`
returns what the hooks of one optimizer step gathered, and `Observer.discard` starts the next step.
"""

import time
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stabnorm._models.devices import device_of
from stabnorm._models.hooks import take_off
from stabnorm._models.watched import Watcher, Watching
from stabnorm.functional.detail import DetailMoments
from stabnorm.monitor.accumulators import Accumulators
from stabnorm.monitor.details import INPUT_NEEDS, Details
from stabnorm.monitor.fused import FusedNorm, can_fuse
from stabnorm.monitor.gradient_hooks import GradientHooks
from stabnorm.monitor.layer_hook import LayerHook
from stabnorm.ops.detail import accumulate_detail_, count_outliers_
from stabnorm.ops.dispatch import one_at_a_time
from stabnorm.ops.moments import accumulate_moments_
from stabnorm.ops.repeated import RepeatedMoments


class Observer:
    """The hooks on the norms of a model, which fill accumulators.

    Args:
        into: the accumulators; the hooks are put on their layers.
        gradients: whether to gather gradient sums, too.
        details: gathers what the costlier statistics need. Default: nothing more is gathered.
    """

    def __init__(self, into: Accumulators, *, gradients: bool, details: Details | None = None) -> None:
        self.into, self.details = into, details
        self._gradients = GradientHooks(into) if gradients else None
        self._watching: list[Watching] = []
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._hooks: list[_InputHook] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are registered."""
        return bool(self._watching)

    def attach(self) -> None:
        """Watch the calls of every norm, and the gradients of its parameters; if one fails, all hooks come off."""
        try:
            for index in range(len(self.into.layers)):
                self._watch(index)
            self.discard()
            self._modules = weakref.WeakSet(self.into.model.modules())
        except BaseException:
            self.detach()
            raise

    def _watch(self, index: int) -> None:
        needs = frozenset[str]() if self.details is None else self.details.needs
        module = self.into.layers[index].module
        if self.details is not None and needs & INPUT_NEEDS:
            hook: _InputHook = _DetailedInputHook(self.into, index, self.device, self.details)
        else:
            hook = _InputHook(self.into, index, self.device)
        self._hooks.append(hook)
        after = None if self._gradients is None else self._gradients.at_outputs[index]
        self._watching.append(Watching(module, Watcher(hook, after, stand_in=hook.fused)))
        if self.details is not None and "outputs" in needs:
            self._watching.append(Watching(module, Watcher(after=_OutlierHook(hook, self.details))))

    def detach(self) -> None:
        """Remove all hooks."""
        take_off(self._watching)
        self._hooks.clear()
        if self._gradients is not None:
            self._gradients.remove()

    def modules_changed(self) -> bool:
        """Whether the model has got or lost a module since this was asked before, or since the hooks were put on."""
        now = weakref.WeakSet(self.into.model.modules())
        changed = self.attached and now != self._modules
        self._modules = now
        return changed

    def discard(self) -> None:
        """Discard what was gathered since the last step."""
        self.into.clear()
        if self.details is not None:
            self.details.discard()
        if self._gradients is not None and self.attached:
            self._gradients.follow()

    @property
    def device(self) -> torch.device:
        """The device on which the first norm runs or will run."""
        if self._hooks:
            return self._hooks[0].account.seen.device
        return device_of(self.into.layers[0].module, self.into.model)


class _InputHook(LayerHook):
    """Forward pre-hook that adds the moments of a norm's input to its row."""

    def __init__(self, into: Accumulators, index: int, device: torch.device) -> None:
        super().__init__(into, index)
        # Allocated now and not at the first forward, because a compiled graph holds on to it.
        parameter = next(self.layer.module.parameters(), None)
        self.account = into.account(index, device if parameter is None else parameter.device)
        self._seen: tuple[Tensor, npt.NDArray[np.int64] | None] | None = None  # the account's, and its memory on a host
        self._repeated = RepeatedMoments()
        self.fused: FusedNorm | None = None
        if into.fused and can_fuse(self.layer):
            self.fused = FusedNorm(into, self.layer, self.add)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.fused is not None and not torch.compiler.is_compiling():
            self.fused.forget()
        if not self.counts(module):
            return
        if torch.compiler.is_compiling():  # a checkpoint's graph must not change our attributes
            self.observe(module, args, kwargs)
            return
        start = time.perf_counter()
        into = self.into
        x = self._repeated.add(args, kwargs, into.normalized and into.dear) if self.fused is None else None
        if x is None:
            self.observe(module, args, kwargs)
        else:
            self.observe_more(x, None)
        into.seconds += time.perf_counter() - start

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = self.layer
        x = layer.input_of(args, kwargs)
        if not self.understands(x):
            return
        valid = self.valid(module, x, args, kwargs)
        if self.account.seen.device != x.device:
            self.account = self.into.account(self.index, x.device)
        fused = None if torch.compiler.is_compiling() else self.fused
        if fused is None or not fused.take(module, x, valid, self.account):
            self.add(x, valid)
        self.observe_more(x, valid)

    def add(self, x: Tensor, valid: Tensor | None) -> None:
        """Add the moments of an input to the layer's row."""
        layer, account = self.layer, self.account
        what = (
            x.detach(), valid, account.seen, account.channel, account.token, layer.kind, layer.channel_dim,
            layer.feature_dims, layer.groups, layer.eps, self.into.tokens, self.into.normalized and self.into.dear,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            with torch.no_grad():
                torch.ops.stabnorm.accumulate_moments_.default(*what)
            return
        with one_at_a_time:  # no other thread may add between the question and the answer
            accumulate_moments_(*what, self.nothing_yet())
            self._repeated.remember(x, valid, account, layer.kind, layer.channel_dim, layer.eps, self.into.tokens)

    def observe_more(self, x: Tensor, valid: Tensor | None) -> None:
        """Gather more from this input, in a subclass."""

    def nothing_yet(self) -> bool:
        """Whether the accumulator is known to be empty; that can only be read without a sync on a CPU."""
        seen = self.account.seen
        if self._seen is None or self._seen[0] is not seen:
            self._seen = seen, seen.numpy() if seen.device.type == "cpu" else None  # NumPy, to save a torch operation
        on_host = self._seen[1]
        return on_host is not None and not on_host.any()


class _DetailedInputHook(_InputHook):
    """Forward pre-hook that also adds the detail moments of a norm's input to its row."""

    def __init__(self, into: Accumulators, index: int, device: torch.device, details: Details) -> None:
        super().__init__(into, index, device)
        self.details = details
        self.detail = details.account(index, self.account.seen.device)

    @torch.no_grad()
    def observe_more(self, x: Tensor, valid: Tensor | None) -> None:
        layer, details = self.layer, self.details
        if not self.into.dear:
            return
        if self.detail.seen.device != x.device:
            self.detail = details.account(self.index, x.device)
        compiling = torch.compiler.is_compiling()
        op = torch.ops.stabnorm.accumulate_detail_.default if compiling else accumulate_detail_
        op(
            x.detach(), valid, *self.detail, layer.channel_dim, layer.feature_dims, layer.eps,
            "token_shape" in details.needs, "values" in details.needs, "sequences" in details.needs,
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
        return self.details.account(self.index, device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        compiling = torch.compiler.is_compiling()
        if self.layer.goes_on or not self.into.dear or not self.counts(module) or not self.understands(output):
            return
        start = 0.0 if compiling else time.perf_counter()
        if self.detail.seen.device != output.device:
            self.detail = self.row(output.device)
        op = torch.ops.stabnorm.count_outliers_.default if compiling else count_outliers_
        layer, valid = self.layer, self.valid(module, output, args, kwargs)
        with torch.no_grad():
            op(output.detach(), valid, self.detail.counts, self.detail.outputs, layer.channel_dim, layer.feature_dims)
        if not compiling:
            self.into.seconds += time.perf_counter() - start
