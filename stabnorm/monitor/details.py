"""What only some statistics need, and what gathers it: detail moments, parameters, optimizer states.

A monitor has a `Details` only when a chosen statistic names one of these in its `needs`; the others do not pay for it.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from stabnorm._checks import is_collection, shown
from stabnorm.functional.detail import DetailMoments, clear_detail_, empty_detail, merge_detail_
from stabnorm.monitor.accumulators import Accumulators
from stabnorm.monitor.bands import Band
from stabnorm.monitor.detailed import DetailedMoments
from stabnorm.monitor.parameter_values import Parameters, adam_figures
from stabnorm.monitor.past import Moments
from stabnorm.statistic import Statistic

INPUT_NEEDS = {"token_shape", "values", "sequences"}  # gathered by the op on a norm's input
DETAIL_NEEDS = INPUT_NEEDS | {"outputs", "parameters", "optimizer"}


def is_detailed(statistics: Iterable[Statistic]) -> bool:
    """Whether any of these statistics needs more than `Moments` has."""
    return any(statistic.remembers or statistic.needs_all & DETAIL_NEEDS for statistic in statistics)


class Details:
    """Gathers what the chosen statistics need beside the moments: for each band of layers a slab, on each device.

    Args:
        into: the accumulators, whose layers and bands these are.
        needs: the needs of all chosen statistics.
    """

    def __init__(self, into: Accumulators, needs: Collection[str]) -> None:
        self.needs = frozenset(needs)
        self._into = into
        self._slabs: dict[torch.device, list[DetailMoments]] = {}
        self._unknown: dict[Band, Parameters] = {}

    def slabs(self, device: torch.device) -> list[DetailMoments]:
        """The slabs on a device; a model spread over several has some on each, of which other rows stay empty."""
        if device not in self._slabs:
            self._slabs[device] = [empty_detail(len(b.rows), b.width, device) for b in self._into.bands]
        return self._slabs[device]

    def account(self, index: int, device: torch.device) -> DetailMoments:
        """Return a layer's row, as views."""
        band, row = self._into.places[index]
        slab, channels = self.slabs(device)[band], self._into.layers[index].num_features
        rows = {name: part[row] for name, part in slab._asdict().items()}
        return DetailMoments(**rows)._replace(
            outputs=slab.outputs[row, :channels], sequences=slab.sequences[row, :, :channels]
        )

    def take(self, device: torch.device) -> list[DetailMoments]:
        """Merged detail moments of the layers of each band on one device; views of the slabs."""
        merged = self.slabs(device)
        for other, slabs in self._slabs.items():
            for into, slab in zip(merged, slabs, strict=True) if other != device else ():
                merge_detail_(into, DetailMoments(*(part.to(device, non_blocking=True) for part in slab)))
        return merged

    def discard(self) -> None:
        """Discard what was gathered since the last step."""
        for slabs in self._slabs.values():
            for slab in slabs:
                clear_detail_(slab)

    def beside(
        self, band: Band, now: Moments, detail: DetailMoments, optimizers: Sequence[Optimizer]
    ) -> DetailedMoments:
        """A band's moments of the step, its detail moments, and what parameters and optimizer say."""
        device, dtype = now.mean.device, now.mean.dtype
        if "parameters" in self.needs:
            parameters = Parameters.of(band.layers, band.width, device, dtype)
        else:
            unknown = self._unknown.get(band)
            if unknown is None or unknown.gain.device != device:
                unknown = self._unknown[band] = Parameters.unknown(len(band.layers), band.width, device, dtype)
            parameters = unknown
        adam = adam_figures(band.layers, optimizers if "optimizer" in self.needs else (), device)
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


def weight_decay_of(optimizers: Sequence[Optimizer]) -> float | None:
    """Return the largest weight decay of all parameter groups, as norms and biases often have none; None if unknown."""
    decays = [group.get("weight_decay") for optimizer in optimizers for group in optimizer.param_groups]
    return max((float(decay) for decay in decays if isinstance(decay, int | float)), default=None)
