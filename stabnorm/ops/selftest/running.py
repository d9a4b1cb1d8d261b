"""The comparisons of `stabnorm.ops.running`: three or more batches, one of them not finite and one an outlier."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stabnorm.ops.running import (
    REMEMBERED,
    quadratic_gradient_,
    smooth_gradient_,
    smooth_square_,
    track_batch_,
    track_quadratic_,
)
from stabnorm.ops.selftest import Case, Results

PATIENCE, EPS, WINDOW = 3, 1e-5, 4


class _Counters(NamedTuple):
    """The counters of a norm."""

    step: Tensor
    skips: Tensor
    progress: Tensor

    def result(self) -> tuple[Tensor, float, bool]:
        return torch.stack([self.step, self.skips, *self.progress]).double(), 0.0, False


def _counters(case: Case) -> _Counters:
    return _Counters(*(torch.zeros(size, dtype=torch.int64, device=case.x.device) for size in ((), (), 3)))


def _squares(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield 14 second moments with counts: the third is not finite, the eighth and those from the tenth are huge."""
    base = case.vectors[3].square() + 0.5
    for number in range(14):
        square = base * (1 + 0.02 * case.vectors[number % 3].tanh()) * (1e4 if number == 7 or number > 8 else 1.0)
        square = torch.where(torch.tensor(number == 2, device=square.device), torch.nan, square)
        yield square, torch.full((), 5.0 + number, device=square.device, dtype=square.dtype)


def _results_of_forwards(
    divisors: list[Tensor], gates: list[Tensor], running: Tensor, recent: Tensor, counters: _Counters
) -> Results:
    together = torch.stack(divisors).nan_to_num(1.0)
    return {
        "divisors": (together, together, False),
        "gates": (torch.stack(gates).double(), 0.0, False),
        "running": (running, running, False),
        "recent": (recent, recent.abs() + 1, False),
        "counters": counters.result(),
    }


@track_batch_.check
def without_a_filter(case: Case) -> Results:
    """Track three batches, one of them not finite, as RepBN does: centred or not, moving or plain average."""
    results: Results = {}
    means, squares, device = case.vectors[:3], case.vectors[3:].square(), case.x.device
    for center, momentum in ((True, 0.1), (False, -1.0)):
        running, counters = (torch.zeros_like(means[0]), torch.ones_like(means[0])), _counters(case)
        for number, (mean, square) in enumerate(zip(means, squares, strict=True)):
            square = torch.where(torch.tensor(number == 1, device=device), torch.nan, square)
            count = torch.full((), 5.0 + number, device=device, dtype=square.dtype)
            means_ = (mean, running[0]) if center else (None, None)
            track_batch_(
                means_[0], square, count, means_[1], running[1], None, *counters, PATIENCE, momentum, EPS, True
            )
        natural = means.abs().amax() + squares.amax() + 1
        results |= {
            f"mean, {center}": (running[0], natural, False),
            f"variance, {center}": (running[1], natural, False),
            f"counters, {center}": counters.result(),
        }
    return results


@track_batch_.check
def with_a_filter(case: Case) -> Results:
    """Track batches of which the filter refuses some, until its patience ends, with a short and a long window."""
    results: Results = {}
    for length in (WINDOW, 9):
        running, counters = torch.ones_like(case.vectors[0]), _counters(case)
        window = running.expand(length, -1).clone()
        for square, count in _squares(case):
            track_batch_(None, square, count, None, running, window, *counters, PATIENCE, 0.1, EPS, True)
        results |= {
            f"variance, {length}": (running, running, False),
            f"window, {length}": (window, window, False),
            f"counters, {length}": counters.result(),
        }
    return results


@smooth_square_.check
def divisors_of_unified_normalization(case: Case) -> Results:
    """Compute the divisors of the batches, with two steps of warm-up."""
    running, counters = torch.ones_like(case.vectors[0]), _counters(case)
    window, recent = running.expand(WINDOW, -1).clone(), running.new_full((REMEMBERED, 2 * len(running) + 1), -1.0)
    divisors, gates = [], []
    for square, count in _squares(case):
        divisor, gate = smooth_square_(
            square, count, window, running, recent, *counters, 2, PATIENCE, 0.1, EPS, True, True
        )
        divisors.append(divisor)
        gates.append(gate)
    results = _results_of_forwards(divisors, gates, running, recent, counters)
    return results | {"window": (window, window, False)}


@smooth_gradient_.check
def gradients_of_unified_normalization(case: Case) -> Results:
    """Compute psi of eight batches: one refused in the forward, one not finite, and one of the warm-up."""
    average = torch.zeros_like(case.vectors[0])
    window, filled = average.expand(WINDOW, -1).clone(), torch.zeros((), dtype=torch.int64, device=average.device)
    psis = []
    for number, gradient in enumerate([*case.vectors, *case.vectors[:2]]):
        gradient = torch.where(torch.tensor(number == 2, device=gradient.device), torch.nan, gradient)
        gate = torch.tensor([number != 1, number > 0], device=gradient.device)
        psis.append(smooth_gradient_(gradient, gate, window, average, filled, 0.1))
    natural = case.vectors.abs().amax()
    return {
        "psi": (torch.stack(psis).nan_to_num(0.0), natural, False),
        "average": (average, natural, False),
        "window": (window, natural, False),
        "filled": (filled.double(), 0.0, False),
    }


@track_quadratic_.check
def divisors_of_power_norm(case: Case) -> Results:
    """Compute the divisors of the batches, with four steps of warm-up."""
    running, counters = torch.ones_like(case.vectors[0]), _counters(case)
    recent = running.new_full((REMEMBERED, 2 * len(running) + 1), -1.0)
    divisors, gates = [], []
    for square, count in _squares(case):
        divisor, gate = track_quadratic_(square, count, running, recent, *counters, 4, 0.9, True)
        divisors.append(divisor)
        gates.append(gate)
    return _results_of_forwards(divisors, gates, running, recent, counters)


@quadratic_gradient_.check
def gradients_of_power_norm(case: Case) -> Results:
    """Compute psi of six batches: one refused in the forward, one not finite, and one of the warm-up."""
    nu, psis = torch.zeros_like(case.vectors[0]), []
    for number, gradient in enumerate(case.vectors):
        power = case.vectors[(number + 1) % 6].square()
        gradient = torch.where(torch.tensor(number == 2, device=gradient.device), torch.nan, gradient)
        gate = torch.tensor([number != 1, number > 0], device=gradient.device)
        psis.append(quadratic_gradient_(gradient, power, gate, nu, 0.9))
    natural = case.vectors.abs().amax() * (1 + case.vectors.square().amax())
    return {"psi": (torch.stack(psis).nan_to_num(0.0), natural, False), "nu": (nu, natural, False)}
