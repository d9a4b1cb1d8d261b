"""Two processes with sync=True are one process with the joined batch: output, gradients, buffers."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stabnorm.nn import PowerNorm, PRepBN, RepBN, TaperNorm, UnifiedNorm
from tests.nn_modules import run, state
from tests.processes import one_after_the_other, run_ranks

pytestmark = [pytest.mark.slow, one_after_the_other]

STEPS, RANKS = 12, 2


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    half = PRepBN(6, sync=True)
    half.lam.fill_(0.5)
    norms: dict[str, nn.Module] = {
        "unified": UnifiedNorm(6, warmup_steps=3, sync=True),
        "rep": RepBN(6, sync=True),
        "rep, scale only": RepBN(6, center=False, sync=True),
        "rep, filtered": RepBN(6, filtration="calibrated", sync=True),
        "prep": half,
        "taper": TaperNorm(6, sync=True),
        "power": PowerNorm(6, warmup_steps=3, sync=True),
    }
    for norm in norms.values():
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 1.0, 0.3)
    return norms


def batch(step: int, masked: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(step)
    x, dy = (torch.randn(8, 16, 6, generator=generator) for _ in range(2))
    x[:5] += 3  # ranks with different means
    if step == 10:
        x *= 40  # an outlier
    if step == 8:
        x[0, 0, 0] = torch.nan  # on one rank
    mask = torch.rand(8, 16, generator=generator) > 0.4 if masked else None
    return x, dy, mask


def trained(norm: nn.Module, rows: slice, masked: bool, times: int = 1) -> list[tuple[Tensor, Tensor]]:
    results = []
    for step in range(STEPS):
        x, dy, mask = batch(step, masked)
        results.append(run(norm, x[rows], times * dy[rows], None if mask is None else mask[rows]))
        if step == 8:
            for parameter in norm.parameters():
                parameter.grad = None
    return results


def one_rank(rank: int, folder: Path, masked: bool) -> None:
    tensors = {}
    rows = slice(0, 5) if rank == 0 else slice(5, 8)  # uneven
    for name, norm in modules().items():
        # A rank's loss is the mean over its share: its gradients are those of the whole batch's mean, times the ranks.
        results = [(y, dx / RANKS) for y, dx in trained(norm, rows, masked, RANKS)]
        tensors[name] = (results, state(norm), [p.grad for p in norm.parameters()])
    model = DistributedDataParallel(UnifiedNorm(6, warmup_steps=2, sync=True))
    for step in range(6):
        x, dy, _ = batch(step, False)
        model(x[rows]).backward(dy[rows])
    tensors["ddp"] = ([], state(model.module), [])
    torch.save(tensors, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("masked", [False, True])
def test_two_processes_equal_one_with_the_joined_batch(masked: bool, tmp_path: Path) -> None:
    run_ranks(one_rank, tmp_path, masked)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, norm in modules().items():
        want = trained(norm, slice(None), masked)
        for step, (joined, one, two) in enumerate(zip(want, first[name][0], second[name][0], strict=True)):
            if step == 8:
                continue  # the NaN batch: its output is what it is
            for part in (0, 1):
                torch.testing.assert_close(
                    torch.cat([one[part], two[part]]), joined[part], rtol=1e-6, atol=3e-6, msg=f"{name}, step {step}"
                )
        for key, value in state(norm).items():
            for rank in (first, second):
                torch.testing.assert_close(rank[name][1][key], value, rtol=3e-6, atol=3e-6, msg=f"{name} {key}")
        for one, two, parameter in zip(first[name][2], second[name][2], norm.parameters(), strict=True):
            torch.testing.assert_close((one + two) / RANKS, parameter.grad, rtol=1e-5, atol=1e-5)
    for key, value in first["ddp"][1].items():
        assert torch.equal(value, second["ddp"][1][key]), key


def test_without_a_process_group_sync_is_a_single_process() -> None:
    norm = RepBN(6, sync=True)
    alone = copy.deepcopy(norm)
    alone.sync = False
    x, dy, _ = batch(0, False)
    for got, want in zip(run(norm, x, dy), run(alone, x, dy), strict=True):
        torch.testing.assert_close(got, want)
