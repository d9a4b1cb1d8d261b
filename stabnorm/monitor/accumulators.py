"""The accumulators that hooks fill: raw moments and gradient sums of all layers since the last step, on each device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stabnorm._models.wrappers import unwrapped
from stabnorm.functional import RawMoments, merge_moments_
from stabnorm.functional.moments import MAX, MIN, RAW
from stabnorm.monitor.bands import bands_of
from stabnorm.monitor.outputs import say
from stabnorm.norms import NormLayer
from stabnorm.ops.accumulators import empty_accumulators, merge_accumulators
from stabnorm.ops.observed import splits_for


class Accumulators:
    """Moments and gradient sums on each device: for each band of layers a slab, with a row for each layer.

    Args:
        model: forwards count while it is in training mode.
        layers: the norms.
        tokens, normalized: what is gathered beside the channel moments, see `Statistic.needs`.
        merged: what is gathered will be merged over ranks; else the gradient of a sharded parameter cannot be known.
        fused: kernels that compute a norm and its moments in one pass may fill the slabs.

    Attributes:
        bands: the layers of like width.
        places: the number of each layer's band, and its row there.
        seconds: spent in hooks so far, on the host; not counted in a compiled graph.
        paused: whether forwards do not count now, for example those of a validation.
        dear: whether this step gathers what `stabnorm.monitor.budget` spares at most steps.
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
        self.bands = bands_of(self.layers)
        self.places = {
            row: (band, of_band) for band, of in enumerate(self.bands) for of_band, row in enumerate(of.rows)
        }
        self.seconds = 0.0
        self.paused = self.in_eval = False
        self.dear = True
        self.steps = 0
        self.at_gain: set[int] = set()
        self.at_output: set[int] = set()
        self.on_take: list[Callable[[], None]] = []
        self.backward = (-1, False)
        self._refused: set[int] = set()
        self._slabs: dict[torch.device, list[RawMoments]] = {}  # one for each band
        self._zeroed: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}  # all that is 0 when it is empty
        self._others: dict[
            tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]
        ] = {}  # and what they hold then
        self._gradients: dict[torch.device, list[Tensor]] = {}

    def slabs(self, device: torch.device) -> list[RawMoments]:
        """The moments on a device; a model spread over several has slabs on each, of which other rows stay empty."""
        if device not in self._slabs:
            self._slabs[device] = [
                empty_accumulators(len(b.rows), b.width, device, splits_for(b.width, device) if self.fused else 0)
                for b in self.bands
            ]
            for slab in self._slabs[device]:
                for tensor, field in zip(slab, RAW.fields.values(), strict=True):
                    self._remember_to_clear(tensor, zero=field.is_zero_when_empty)
        return self._slabs[device]

    def _remember_to_clear(self, tensor: Tensor, *, zero: bool = False) -> None:
        """Let `clear` empty a tensor that is empty now, together with the others of its device and dtype."""
        kind = tensor.device, tensor.dtype
        if zero:
            self._zeroed.setdefault(kind, []).append(tensor)
        else:
            self._others.setdefault(kind, []).append((tensor, tensor.clone()))

    def account(self, index: int, device: torch.device) -> RawMoments:
        """A layer's row of its slab, as views."""
        band, row = self.places[index]
        slab, channels = self.slabs(device)[band], self.layers[index].num_features
        return RawMoments(slab.seen[row], slab.channel[row, ..., :channels], slab.token[row])

    def gradients(self, device: torch.device) -> list[Tensor]:
        """Gradient sums ``[L, 2, C]`` on a device, see `past.Moments`; NaN where none came since the last step."""
        if device not in self._gradients:
            shapes = [(len(band.rows), 2, band.width) for band in self.bands]
            self._gradients[device] = [
                torch.full(shape, torch.nan, dtype=torch.float32, device=device) for shape in shapes
            ]
            for sums in self._gradients[device]:
                self._remember_to_clear(sums)
        return self._gradients[device]

    def gradient(self, index: int, device: torch.device) -> Tensor:
        """A layer's gradient sums ``[2, C]``, as a view."""
        band, row = self.places[index]
        return self.gradients(device)[band][row, :, : self.layers[index].num_features]

    def read_at_gain(self, index: int, device: torch.device) -> None:
        """Note that a layer's gradient is read at its gain; what was read at its output does not count then."""
        self.at_gain.add(index)
        if index in self.at_output:
            self.at_output.remove(index)
            self.gradient(index, device).fill_(torch.nan)

    def refuse(self, index: int, reason: str) -> None:
        """Say once that a layer is not counted."""
        if index not in self._refused:
            self._refused.add(index)
            say("norm %s is not counted: %s", self.layers[index].name, reason)

    def take(self, device: torch.device) -> list[tuple[RawMoments, Tensor]]:
        """Merged moments and gradient sums of the layers of each band, on one device; views of the slabs."""
        merged = [merge_accumulators(slab) for slab in self.slabs(device)]
        for other, slabs in self._slabs.items():
            for into, slab in zip(merged, slabs, strict=True) if other != device else ():
                moments = (part.to(device, non_blocking=True) for part in merge_accumulators(slab))
                merge_moments_(into, RawMoments(*moments))
        for settle in self.on_take:
            settle()
        gradients = self.gradients(device)
        for other, sums in self._gradients.items():
            if other != device:
                gradients = [
                    torch.where(own.isnan(), others.to(device, non_blocking=True), own)
                    for own, others in zip(gradients, sums, strict=True)
                ]
        return list(zip(merged, gradients, strict=True))

    def largest(self, device: torch.device) -> Tensor:
        """Return the largest |x| of each layer since the last step, ``[L]``, infinite where an element was not finite.

        It is 0 where a layer did not run. Nothing is changed.
        """
        highest = torch.zeros(len(self.layers), dtype=torch.float32, device=device)
        for slabs in self._slabs.values():
            for band, slab in zip(self.bands, slabs, strict=True):
                size = torch.maximum(slab.channel[..., MAX, :], -slab.channel[..., MIN, :]).amax(-1)
                size = torch.where(size.isnan(), torch.inf, size)
                size = torch.where(slab.seen > 0, size, 0)
                size = (size.amax(1) if size.ndim > 1 else size).to(device, torch.float32)
                rows = list(band.rows)
                highest[rows] = torch.maximum(highest[rows], size)
        return highest

    def clear(self) -> None:
        """Empty all accumulators, with few operations whatever the number of bands: each is a launch on a GPU."""
        for tensors in self._zeroed.values():
            if len(tensors) == 1:
                tensors[0].zero_()  # one launch whatever its size, which a list may not be
            else:
                torch._foreach_zero_(tensors)
        for pairs in self._others.values():
            torch._foreach_copy_([tensor for tensor, _ in pairs], [empty for _, empty in pairs])
        self.steps += 1
        for read in (self.at_gain, self.at_output, self.on_take):
            read.clear()
