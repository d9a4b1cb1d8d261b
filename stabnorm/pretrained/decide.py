"""Which norms stay: worst first, until the converted model is close enough to the original on held-out data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stabnorm._models.devices import device_of
from stabnorm._models.ranks import gather_over_ranks
from stabnorm.fit.watch import Runner
from stabnorm.nn.prep import PRepBN
from stabnorm.pretrained.repair import Distance
from stabnorm.switch.lam import write_lam


class HeldOut:
    """Batches to judge on: neither fitted to nor trained on.

    Args:
        original: in eval mode.
        batches: at least one.
        run: how a model is run.
        distance: ``loss(output, original_output)``.
    """

    def __init__(self, original: nn.Module, batches: Sequence[Any], run: Runner, distance: Distance) -> None:
        self.original, self.batches, self.run, self.distance = original, batches, run, distance

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """The mean distance to the original's output, over the batches of all ranks."""
        errors = []
        for batch in self.batches:
            wanted = self.run(self.original, batch)
            with self.run.prepared(model, batch) as prepared:
                errors.append(self.distance(self.run.forward(model, prepared), wanted).double().reshape(()))
        everyone = gather_over_ranks(torch.stack(errors).mean().to(device_of(model)))
        return float(everyone.mean())


def keep_only(norms: Mapping[str, PRepBN], kept: Iterable[str]) -> None:
    """Make these norms themselves again, and the others their affine maps."""
    stay = set(kept)
    write_lam(norms.values(), [float(name in stay) for name in norms])


def costs_of(norms: Mapping[str, PRepBN], gone: Sequence[str], model: nn.Module, held_out: HeldOut) -> dict[str, float]:
    """By how much the held-out error would fall were this norm alone put back; one run over the batches for each.

    Args:
        norms: all of the model's.
        gone: those that are affine maps now, and are so again afterwards.
        model: it holds them.
        held_out: what to judge on.
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
    """The shortest beginning of `order` that has to be kept for the error to be at most `tolerance`.

    By bisection, in about log2(N) evaluations: with more norms kept the error is taken to be no larger. What is
    returned was evaluated and held, or is all of them.

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
