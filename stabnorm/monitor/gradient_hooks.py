"""Hooks that gather gradient sums from gain and bias, or from the output of a norm without a trainable gain."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._models.ranks import Part, is_distributed, own_part
from stabnorm.monitor.accumulators import Accumulators, LayerHook


class ParameterHook(LayerHook):
    """Hook after a backward that writes gain times the parameter's accumulated gradient into its row.

    Under DDP this is the gradient of the rank, before the reduction (with several backwards: the mean so far plus its
    own). FSDP2 calls the hook with the reduced gradient, of which each rank has a shard. The shard is multiplied by the
    number of shards, so that the mean over ranks is the whole gradient.
    """

    def __init__(self, into: Accumulators, index: int, row: int) -> None:
        super().__init__(into, index)
        self.row = row

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        """Add a gradient that was just accumulated."""
        start = time.perf_counter()
        gradient, layer = parameter.grad, self.layer
        if gradient is not None and self.into.model.training:
            row = self.into.gradients(gradient.device)[self.index, self.row, : layer.num_features]
            if not is_distributed(gradient):
                row.copy_(gradient.flatten())
                if layer.gain is not None:
                    row.mul_(layer.gain)
            elif self.into.merged and (part := own_part(gradient)) is not None:
                gain = self.gain_of(part)
                row.zero_()
                row[part.start : part.stop] = part.values * part.parts * gain
        self.into.seconds += time.perf_counter() - start

    def gain_of(self, part: Part) -> Tensor:
        """Return the gain of a shard's channels, whether or not FSDP2 has gathered the whole parameter."""
        weight = self.layer.gain_parameter
        assert weight is not None  # it was hooked
        if is_distributed(weight):
            own = own_part(weight)
            assert own is not None  # as the gradient's
            return own.values + self.layer.gain_offset
        return weight.flatten()[part.start : part.stop] + self.layer.gain_offset


class OutputHook(LayerHook):
    """Forward hook for a norm without a trainable gain: gathers the gradient at its output, in eager mode."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Put a hook on the output of a forward."""
        if torch.compiler.is_compiling() or not self.into.model.training:
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        y = output.detach().clone()  # a copy, because an in-place activation would change it before the backward
        output.register_hook(lambda gradient: self._add(gradient, y))

    @torch.no_grad()
    def _add(self, gradient: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        layer = self.layer
        g, y = (layer.rows(t.detach()).float() for t in (gradient, y))
        if layer.bias is not None:
            y = y - layer.bias
        shift = g.sum(0) if layer.gain is None else g.sum(0) * layer.gain
        row = self.into.gradients(g.device)[self.index, :, : layer.num_features]
        row.copy_(torch.where(row.isnan(), 0, row) + torch.stack([(g * y).sum(0), shift]))
        self.into.seconds += time.perf_counter() - start
