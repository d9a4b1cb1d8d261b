"""What only some statistics need, and what gathers it: detail moments, parameters, optimizer states.

A monitor has a `Details` only when a chosen statistic names one of these in its `needs`; the others do not pay for it.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from stabnorm._checks import is_collection, shown
from stabnorm.functional.detail import DetailMoments, clear_detail_, empty_detail, merge_detail_
from stabnorm.monitor.detailed import DetailedMoments
from stabnorm.monitor.parameter_values import Parameters, adam_figures
from stabnorm.monitor.past import Moments
from stabnorm.norms import NormLayer
from stabnorm.statistic import Statistic

INPUT_NEEDS = {"token_shape", "values", "sequences"}  # gathered by the op on a norm's input
DETAIL_NEEDS = INPUT_NEEDS | {"outputs", "parameters", "optimizer"}


def is_detailed(statistics: Iterable[Statistic]) -> bool:
    """Whether any of these statistics needs more than `Moments` has."""
    return any(statistic.remembers or statistic.needs_all & DETAIL_NEEDS for statistic in statistics)


class DetailSlabs:
    """The detail moments of all layers, on each device that layers run on.

    Args:
        layers: the norms.
        width: number of channels of the widest layer.
    """

    def __init__(self, layers: Sequence[NormLayer], width: int) -> None:
        self._layers, self._width = tuple(layers), width
        self._slabs: dict[torch.device, DetailMoments] = {}

    def slab(self, device: torch.device) -> DetailMoments:
        """The slab on a device; a model spread over several has one on each, of which the others stay empty."""
        if device not in self._slabs:
            self._slabs[device] = empty_detail(len(self._layers), self._width, device)
        return self._slabs[device]

    def account(self, index: int, device: torch.device) -> DetailMoments:
        """Return a layer's row, as views."""
        slab, channels = self.slab(device), self._layers[index].num_features
        rows = {name: part[index] for name, part in slab._asdict().items()}
        return DetailMoments(**rows)._replace(
            outputs=slab.outputs[index, :channels], sequences=slab.sequences[index, :, :channels]
        )

    def take(self, device: torch.device) -> DetailMoments:
        """Merged detail moments of all layers on one device; views of the slab."""
        merged = self.slab(device)
        for other, slab in self._slabs.items():
            if other != device:
                merge_detail_(merged, DetailMoments(*(part.to(device, non_blocking=True) for part in slab)))
        return merged

    def clear(self) -> None:
        """Empty the accumulators."""
        for slab in self._slabs.values():
            clear_detail_(slab)


class Details:
    """Gathers what the chosen statistics need beside the moments.

    Args:
        layers: the norms.
        width: the widest one's channels.
        needs: the needs of all chosen statistics.
    """

    def __init__(self, layers: Sequence[NormLayer], width: int, needs: Collection[str]) -> None:
        self.needs = frozenset(needs)
        self.slabs = DetailSlabs(layers, width)
        self._layers, self._width = tuple(layers), width
        self._unknown: Parameters | None = None

    def discard(self) -> None:
        """Discard what was gathered since the last step."""
        self.slabs.clear()

    def beside(self, now: Moments, detail: DetailMoments, optimizers: Sequence[Optimizer]) -> DetailedMoments:
        """The step's moments, what `slabs` gave, and what parameters and optimizer say."""
        device, dtype, layers = now.mean.device, now.mean.dtype, len(self._layers)
        if "parameters" in self.needs:
            parameters = Parameters.of(self._layers, self._width, device, dtype)
        else:
            if self._unknown is None or self._unknown.gain.device != device:
                self._unknown = Parameters.unknown(layers, self._width, device, dtype)
            parameters = self._unknown
        adam = adam_figures(self._layers, optimizers if "optimizer" in self.needs else (), device)
        return DetailedMoments.beside(now, detail, parameters, adam)


def optimizers_of(given: Any) -> tuple[Optimizer, ...]:
    """Return one optimizer or several as a tuple.

    Raises:
        TypeError: one of them is not an optimizer.
    """
    optimizers = tuple(given) if is_collection(given) else (given,)
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer is a torch.optim.Optimizer, or several of them, got {shown(one)}")
    return optimizers
