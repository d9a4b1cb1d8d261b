"""Hooks that gather gradient sums: of what comes back to gain and bias, or to the output of a norm that has none."""

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stabnorm._models.hooks import Hook
from stabnorm._models.ranks import Part, is_distributed, own_part

if TYPE_CHECKING:
    from stabnorm.monitor.observe import Observer


class LayerHook(Hook):
    """A hook of one layer."""

    def __init__(self, observer: "Observer", index: int) -> None:
        self.observer, self.layer, self.index = observer, observer.layers[index], index


class ParameterHook(LayerHook):
    """After a backward: gain times the parameter's gradient, as accumulated so far, into its row.

    Under DDP this is the rank's own gradient, before the reduction (or the mean so far and its own on top). FSDP2 calls
    it with the reduced one, of which each rank has a part: that goes in as often as there are parts, and the mean over
    ranks is the whole.
    """

    def __init__(self, observer: "Observer", index: int, row: int) -> None:
        super().__init__(observer, index)
        self.row = row

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        """Its gradient is accumulated."""
        start = time.perf_counter()
        gradient, layer = parameter.grad, self.layer
        if gradient is not None and self.observer.model.training:
            row = self.observer.gradient_slab(gradient.device)[self.index, self.row, : layer.num_features]
            if not is_distributed(gradient):
                row.copy_(gradient.flatten())
                if layer.gain is not None:
                    row.mul_(layer.gain)
            elif self.observer.merged and (mine := own_part(gradient)) is not None:
                gain = self.gain_of(mine)
                row.zero_()
                row[mine.start : mine.stop] = mine.values * mine.parts * gain
        self.observer.seconds += time.perf_counter() - start

    def gain_of(self, part: Part) -> Tensor:
        """The gain of a part's channels, whether FSDP2 has put the whole in its place or not."""
        weight = self.layer.gain_parameter
        assert weight is not None  # it was hooked
        if is_distributed(weight):
            mine = own_part(weight)
            assert mine is not None  # as the gradient's
            return mine.values + self.layer.gain_offset
        return weight.flatten()[part.start : part.stop] + self.layer.gain_offset


class OutputHook(LayerHook):
    """For a norm with no trainable gain: the gradient at its output, in eager mode."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward of the norm is done."""
        if torch.compiler.is_compiling() or not self.observer.model.training:
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
        row = self.observer.gradient_slab(g.device)[self.index, :, : layer.num_features]
        row.copy_(torch.where(row.isnan(), 0, row) + torch.stack([(g * y).sum(0), shift]))
        self.observer.seconds += time.perf_counter() - start
