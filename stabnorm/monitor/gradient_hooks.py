"""Hooks that gather gradient sums: of what comes back to gain and bias, or to the output of a norm that has none."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._models.ranks import Part, is_distributed, own_part
from stabnorm.monitor.accumulators import Accumulators, LayerHook


class ParameterHook(LayerHook):
    """After a backward: gain times the parameter's gradient, as accumulated so far, into its row.

    Under DDP this is the rank's own gradient, before the reduction (or the mean so far and its own on top). FSDP2 calls
    it with the reduced one, of which each rank has a part: that goes in as often as there are parts, and the mean over
    ranks is the whole.
    """

    def __init__(self, into: Accumulators, index: int, row: int) -> None:
        super().__init__(into, index)
        self.row = row

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        """Take in a gradient that has just been accumulated."""
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
        """The gain of a part's channels, whether FSDP2 has put the whole in its place or not."""
        weight = self.layer.gain_parameter
        assert weight is not None  # it was hooked
        if is_distributed(weight):
            own = own_part(weight)
            assert own is not None  # as the gradient's
            return own.values + self.layer.gain_offset
        return weight.flatten()[part.start : part.stop] + self.layer.gain_offset


class OutputHook(LayerHook):
    """For a norm with no trainable gain: the gradient at its output, in eager mode."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Follow the output of a forward that has just ended."""
        if torch.compiler.is_compiling() or not self.into.model.training:
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        y = output.detach().clone()  # an activation in place would change it before the backward comes
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
