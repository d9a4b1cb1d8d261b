"""What only some statistics need, and what gathers it: detail moments, parameters, optimizer states, branch gaps.

A monitor has a `Details` only when a chosen statistic names one of these in its `needs`; the others do not pay for it.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from stabnorm.functional.detail import DetailMoments, clear_detail_, empty_detail, merge_detail_
from stabnorm.monitor.catalogue.statistic import Statistic
from stabnorm.monitor.detailed import DetailedMoments
from stabnorm.monitor.parameters import Parameters, adam_figures
from stabnorm.monitor.past import Moments
from stabnorm.nn.prep import PRepBN
from stabnorm.norms import NormLayer
from stabnorm.switch.branch_gap import BranchGap
from stabnorm.switch.gate import MEASURE_EVERY

INPUT_NEEDS = {"token_shape", "values", "sequences"}  # gathered by the op on a norm's input
DETAIL_NEEDS = INPUT_NEEDS | {"outputs", "parameters", "optimizer", "branches"}


def is_detailed(statistics: Iterable[Statistic]) -> bool:
    """Whether any of them asks for more than `Moments` has."""
    return any(statistic.remembers or statistic.needs_all & DETAIL_NEEDS for statistic in statistics)


class DetailSlabs:
    """The detail moments of all layers, on each device that layers run on.

    Args:
        layers: the norms.
        width: the widest one's channels.
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
        """A layer's row of the slab, as views."""
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
        """Forget what was gathered."""
        for slab in self._slabs.values():
            clear_detail_(slab)


class Details:
    """Gathers what the chosen statistics need beside the moments.

    Args:
        layers: the norms.
        width: the widest one's channels.
        needs: of all chosen statistics.
    """

    def __init__(self, layers: Sequence[NormLayer], width: int, needs: Collection[str]) -> None:
        self.needs = frozenset(needs)
        self.slabs = DetailSlabs(layers, width)
        self._layers, self._width = tuple(layers), width
        self._unknown: Parameters | None = None
        self._progressive = [i for i, layer in enumerate(layers) if isinstance(layer.module, PRepBN)]
        self._gap: BranchGap | None = None
        self._steps = 0
        if "branches" in self.needs and self._progressive:
            self._gap = BranchGap([m for layer in layers if isinstance(m := layer.module, PRepBN)])

    def attach(self) -> None:
        """Put the hooks on that are not the observer's."""
        if self._gap is not None:
            self._gap.attach()
            self._steps, self._gap.armed = 0, True

    def detach(self) -> None:
        """Take them off."""
        if self._gap is not None:
            self._gap.detach()

    def discard(self) -> None:
        """Forget what was gathered since the last step."""
        self.slabs.clear()
        if self._gap is not None:
            self._gap.discard()

    def beside(
        self, now: Moments, detail: DetailMoments, branch_gap: Tensor, optimizer: Optimizer | Sequence[Optimizer]
    ) -> DetailedMoments:
        """The step's moments, what `slabs` and `branch_gap` gave, and what parameters and optimizer say."""
        device, dtype, layers = now.mean.device, now.mean.dtype, len(self._layers)
        if "parameters" in self.needs:
            parameters = Parameters.of(self._layers, self._width, device, dtype)
        else:
            if self._unknown is None or self._unknown.gain.device != device:
                self._unknown = Parameters.unknown(layers, self._width, device, dtype)
            parameters = self._unknown
        optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        for one in optimizers:
            if not isinstance(one, Optimizer):
                raise TypeError(f"optimizer is a torch.optim.Optimizer, or several of them, got {type(one).__name__}")
        adam = adam_figures(self._layers, optimizers if "optimizer" in self.needs else (), device)
        return DetailedMoments.beside(now, detail, parameters, adam, branch_gap.to(dtype))

    def branch_gap(self, device: torch.device) -> Tensor:
        """Of each layer, ``[L]``. It takes two more forwards of a layer, so it is measured now and then."""
        gap = torch.full((len(self._layers),), torch.nan, device=device)
        if self._gap is not None:
            if self._gap.armed:
                where = torch.tensor(self._progressive, device="cpu").to(device, non_blocking=True)
                gap.index_copy_(0, where, self._gap.take().to(gap))
            self._steps += 1
            self._gap.armed = self._steps % MEASURE_EVERY == 0
        return gap
