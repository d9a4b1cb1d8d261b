"""Measure the norms of a trained model: in which order they run, and how far each one is from an affine map."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from stabnorm._checks import check_all, check_has_numbers, check_instance, check_loader, check_model
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
    """What `measure_norms` learned about a model's norms.

    Args:
        levels: the names of the norms by depth: a norm's level comes after the levels of all norms whose output it
            depends on.
        residuals: the affine residual of each norm: the share of its output's variance that no affine map per channel
            of its input reproduces, as a mean over channels. NaN if its input was never finite.
        calls: how often each norm is called on a batch, for the norms where this number is always the same.
        feeders: the layers that feed the norms, see `stabnorm.fit.feed`.
    """

    levels: tuple[tuple[str, ...], ...]
    residuals: dict[str, float]
    calls: dict[str, int]
    feeders: dict[str, Feeder]

    @property
    def names(self) -> list[str]:
        """The names of the norms that ran, in depth order."""
        return [name for level in self.levels for name in level]


def measure_norms(model: nn.Module, layers: Sequence[NormLayer], loader: Iterable[Any], run: Runner) -> Measure:
    """Run the model on all batches, and once more on the first one for the order of the norms.

    Args:
        model: the model, in eval mode; nothing in it changes.
        layers: its norms.
        loader: batches.
        run: how the model is run.

    Raises:
        StabNormError: the loader is empty, or the model does not run on the first batch.
    """
    check_model("model", model)
    check_has_numbers(model, "to measure")
    check_all("layers", layers, NormLayer, "a list of norms, from find_norms")
    check_loader("loader", loader)
    check_instance("run", run, Runner, "a Runner")
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
    late = [[name] for name in calls if name not in placed and calls[name] - {0}]  # not on the first batch
    residuals = {}
    for layer in layers:
        try:
            residuals[layer.name] = sums[layer.name].affine().residual
        except StabNormError:
            residuals[layer.name] = float("nan")
    constant = {name: min(counts) for name, counts in calls.items() if len(counts) == 1}
    return Measure(tuple(tuple(level) for level in [*order.levels, *late]), residuals, constant, order.feeders)
