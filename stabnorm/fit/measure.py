"""What a trained model's norms are like: in which order they run, and how far each is from an affine map."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from stabnorm._models.batches import batches_of
from stabnorm._models.devices import device_of
from stabnorm.errors import StabNormError
from stabnorm.fit.feed import Feeder
from stabnorm.fit.graph import Order, order_of
from stabnorm.fit.sums import ChannelSums
from stabnorm.fit.watch import Runner, seen_in
from stabnorm.norms import NormLayer


@dataclass(frozen=True)
class Measure:
    """What a pass over the batches says about a model's norms.

    Args:
        levels: the norms by depth: a norm's level comes after those of all norms whose output it depends on.
        residuals: each norm's affine residual: the share of its output's variance, mean over channels, that no affine
            map per channel of its input reproduces. NaN where it read nothing finite.
        calls: how often each norm is called on a batch, for those where that is always the same.
        feeders: what feeds the norms, see `stabnorm.fit.feed`.
    """

    levels: tuple[tuple[str, ...], ...]
    residuals: dict[str, float]
    calls: dict[str, int]
    feeders: dict[str, Feeder]

    @property
    def names(self) -> list[str]:
        """The norms that ran, in the order of their depth."""
        return [name for level in self.levels for name in level]


def measure_norms(model: nn.Module, layers: Sequence[NormLayer], loader: Iterable[Any], run: Runner) -> Measure:
    """One pass over the batches, and one forward more for the order.

    Args:
        model: in eval mode; it is run, and nothing of it changes.
        layers: its norms.
        loader: batches.
        run: how it is run.

    Raises:
        StabNormError: the loader is empty, or the model does not run on the first batch.
    """
    sums = {layer.name: ChannelSums(layer.num_features, device_of(layer.module)) for layer in layers}
    calls: dict[str, set[int]] = {layer.name: set() for layer in layers}
    order = Order([], {})
    for number, batch in enumerate(batches_of(loader)):
        if number == 0:
            order = order_of(model, layers, batch, run)
        seen = seen_in(model, layers, batch, run)
        for name in calls:
            calls[name].add(len(seen.get(name, ())))
            for call in seen.get(name, ()):
                sums[name].add(call, call.written)
    placed = {name for level in order.levels for name in level}
    late = [[name] for name in calls if name not in placed and calls[name] - {0}]  # a branch not taken at first
    residuals = {}
    for layer in layers:
        try:
            residuals[layer.name] = sums[layer.name].affine().residual
        except StabNormError:
            residuals[layer.name] = float("nan")
    constant = {name: min(found) for name, found in calls.items() if len(found) == 1}
    return Measure(tuple(tuple(level) for level in [*order.levels, *late]), residuals, constant, order.feeders)
