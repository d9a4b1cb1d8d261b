"""Decide which norms stay, worst first, until the converted model is close to the original on held-out data."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import nn

from stabnorm._models.devices import device_of
from stabnorm._models.ranks import gather_over_ranks
from stabnorm.fit.watch import Runner
from stabnorm.functional import batch_moments, merge_batches
from stabnorm.nn.prep import PRepBN
from stabnorm.pretrained.repair import Distance
from stabnorm.switch.lam import write_lam


class Estimate(NamedTuple):
    """A mean and its 95 % confidence interval by Student's t; the interval is NaN for a single batch."""

    mean: float
    low: float
    high: float


class HeldOut:
    """The batches on which models are judged; they are neither fitted to nor trained on.

    Args:
        original: the original model, in eval mode.
        batches: one batch or more.
        run: how a model is run.
        distance: ``loss(output, original_output)``.
    """

    def __init__(self, original: nn.Module, batches: Sequence[Any], run: Runner, distance: Distance) -> None:
        self.original, self.batches, self.run, self.distance = original, batches, run, distance

    def error(self, model: nn.Module) -> float:
        """Return the mean distance between the outputs of model and original, over the batches of all ranks."""
        return self.estimate(model).mean

    @torch.no_grad()
    def estimate(self, model: nn.Module) -> Estimate:
        """Return this mean with its 95 % confidence interval, for which batches count as independent."""
        errors = []
        for batch in self.batches:
            wanted = self.run(self.original, batch)
            with self.run.prepared(model, batch) as prepared:
                errors.append(self.distance(self.run.forward(model, prepared), wanted).double().reshape(()))
        own = batch_moments(torch.stack(errors)[:, None], None, center=True)
        assert own.mean is not None
        of_rank = torch.stack([own.rows, own.mean[0], own.square[0]]).to(device_of(model))
        counts, means, squares = gather_over_ranks(of_rank).cpu().unbind(1)
        merged = merge_batches(counts, means[:, None], squares[:, None])
        assert merged.mean is not None
        count, mean, variance = int(merged.rows), float(merged.mean), float(merged.square)
        if count < 2:
            return Estimate(mean, math.nan, math.nan)
        low, high = stats.t.interval(0.95, count - 1, mean, math.sqrt(variance / (count - 1)))
        return Estimate(mean, float(low), float(high))


def keep_only(norms: Mapping[str, PRepBN], kept: Iterable[str]) -> None:
    """Let these norms normalise again (lam = 1), and replace all others by their affine maps (lam = 0)."""
    stay = set(kept)
    write_lam(norms.values(), [float(name in stay) for name in norms])


def costs_of(norms: Mapping[str, PRepBN], gone: Sequence[str], model: nn.Module, held_out: HeldOut) -> dict[str, float]:
    """Return by how much the held-out error falls when one norm alone is put back, for each norm in `gone`.

    This takes one run over the held-out batches per norm.

    Args:
        norms: all norms of the model.
        gone: the names of those that are affine maps; they are affine maps again afterwards.
        model: the model that holds the norms.
        held_out: the batches to judge on.
    """
    kept = [name for name in norms if name not in gone]
    without = held_out.error(model)
    costs = {}
    for name in gone:
        keep_only(norms, [*kept, name])
        costs[name] = without - held_out.error(model)
    keep_only(norms, kept)
    return costs


def fewest_kept(order: Sequence[str], error: Callable[[list[str]], float], tolerance: float) -> list[str]:
    """Return the shortest beginning of `order` that must be kept so that the error is at most `tolerance`.

    This is a bisection with about log2(N) evaluations. It assumes that keeping more norms does not increase the error.
    The list that it returns was evaluated and is within the tolerance, or it has all names.

    >>> fewest_kept(["worst", "bad", "good"], lambda kept: 0.3 - 0.1 * len(kept), 0.25)
    ['worst']
    >>> fewest_kept(["worst", "bad", "good"], lambda kept: 1.0, 0.25)
    ['worst', 'bad', 'good']
    """
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if error(list(order[:middle])) <= tolerance:
            high = middle
        else:
            low = middle + 1
    return list(order[:high])
