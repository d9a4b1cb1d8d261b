"""The accumulators that hooks fill: raw moments and gradient sums of all layers since the last step, on each device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stabnorm._models.wrappers import unwrapped
from stabnorm.functional import RawMoments, clear_moments_, merge_moments_
from stabnorm.monitor.outputs import say
from stabnorm.norms import NormLayer
from stabnorm.ops.accumulators import empty_accumulators, merge_accumulators
from stabnorm.ops.observed import splits_for


class Accumulators:
    """Moments and gradient sums on each device, with a row for each layer.

    Args:
        model: forwards count while it is in training mode.
        layers: the norms.
        tokens, normalized: what is gathered beside the channel moments, see `Statistic.needs`.
        merged: what is gathered will be merged over ranks; else the gradient of a sharded parameter cannot be known.
        fused: kernels that compute a norm and its moments in one pass may fill the slab.

    Attributes:
        seconds: spent in hooks so far, on the host; not counted in a compiled graph.
        paused: whether forwards do not count now, for example those of a validation.
        in_eval: whether those of modules in eval mode count, too.
        steps: number of times that the accumulators were emptied.
        at_gain, at_output: the layers whose gradient was read there since the last step.
        on_take: called before the gradients are taken.
        backward: the last backward, as autograd's number, and whether it adds to gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[NormLayer],
        *,
        tokens: bool,
        normalized: bool,
        merged: bool = False,
        fused: bool = False,
    ) -> None:
        self.model: nn.Module = unwrapped(model)  # a hook in a graph must not look at its compiler
        self.layers = tuple(layers)
        self.tokens, self.normalized, self.merged, self.fused = tokens, normalized, merged, fused
        self.width = max(layer.num_features for layer in layers)
        self.seconds = 0.0
        self.paused = self.in_eval = False
        self.steps = 0
        self.at_gain: set[int] = set()
        self.at_output: set[int] = set()
        self.on_take: list[Callable[[], None]] = []
        self.backward = (-1, False)
        self._refused: set[int] = set()
        self._slabs: dict[torch.device, RawMoments] = {}
        self._gradients: dict[torch.device, Tensor] = {}

    def slab(self, device: torch.device) -> RawMoments:
        """The moments on a device; a model spread over several has a slab on each, of which other rows stay empty."""
        if device not in self._slabs:
            splits = splits_for(self.width, device) if self.fused else 0
            self._slabs[device] = empty_accumulators(len(self.layers), self.width, device, splits)
        return self._slabs[device]

    def account(self, index: int, device: torch.device) -> RawMoments:
        """A layer's row of the slab, as views."""
        slab, channels = self.slab(device), self.layers[index].num_features
        return RawMoments(slab.seen[index], slab.channel[index, ..., :channels], slab.token[index])

    def gradients(self, device: torch.device) -> Tensor:
        """Gradient sums ``[L, 2, C]`` on a device, see `past.Moments`; NaN where none came since the last step."""
        if device not in self._gradients:
            shape = (len(self.layers), 2, self.width)
            self._gradients[device] = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        return self._gradients[device]

    def read_at_gain(self, index: int, device: torch.device) -> None:
        """Note that a layer's gradient is read at its gain; what was read at its output does not count then."""
        self.at_gain.add(index)
        if index in self.at_output:
            self.at_output.remove(index)
            self.gradients(device)[index].fill_(torch.nan)

    def refuse(self, index: int, reason: str) -> None:
        """Say once that a layer is not counted."""
        if index not in self._refused:
            self._refused.add(index)
            say("norm %s is not counted: %s", self.layers[index].name, reason)

    def take(self, device: torch.device) -> tuple[RawMoments, Tensor]:
        """Merged moments of all layers and gradient sums, on one device; views of the slabs."""
        merged = merge_accumulators(self.slab(device))
        for other, slab in self._slabs.items():
            if other != device:
                moments = (part.to(device, non_blocking=True) for part in merge_accumulators(slab))
                merge_moments_(merged, RawMoments(*moments))
        for settle in self.on_take:
            settle()
        gradients = self.gradients(device)
        for other, sums in self._gradients.items():
            if other != device:
                gradients = torch.where(gradients.isnan(), sums.to(device, non_blocking=True), gradients)
        return merged, gradients

    def clear(self) -> None:
        """Empty all accumulators."""
        for slab in self._slabs.values():
            clear_moments_(slab)
        for sums in self._gradients.values():
            sums.fill_(torch.nan)
        self.steps += 1
        for read in (self.at_gain, self.at_output, self.on_take):
            read.clear()
