"""Two processes: what is the same on both, what is each one's own, and that its sums merge to the whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stabnorm import StabilityMonitor
from tests.companions.nets import Text, loss
from tests.processes import one_after_the_other, run_ranks
from tests.versions import needs_fsdp_on_cpu

pytestmark = [pytest.mark.slow, one_after_the_other]

STEPS, SIZE = 4, 6
COMPANIONS = ("attention", "weights", "embedding", "output")


def tokens(step: int) -> Tensor:
    return torch.randint(13, (SIZE, 7), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, rows: slice) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]]]:
    """Histories by companion, and the sums of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    sums: list[dict[str, Any]] = []
    with StabilityMonitor(model, "economy", gradients=False, companions=COMPANIONS) as monitor:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(model, tokens(step)[rows]).backward()
            optimizer.step()
            sums.append({name: tuple(track.watch.take()) for name, track in monitor.companions.items()})
            monitor.step()
        return {name: track.history() for name, track in monitor.companions.items()}, sums


def made() -> Text:
    torch.manual_seed(6)
    return Text()


def one_rank(rank: int, folder: Path) -> None:
    rows = slice(0, 3) if rank == 0 else slice(3, 6)
    replicated = train(DistributedDataParallel(made()), rows)
    sharded = made()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    torch.save({"ddp": replicated, "fsdp": train(sharded, rows)}, f"{folder}/{rank}.pt")


@needs_fsdp_on_cpu
def test_two_processes_have_the_weights_and_gradients_of_one_and_their_own_attention(tmp_path: Path) -> None:
    run_ranks(one_rank, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    history, sums = train(made(), slice(None))

    for name in ("weights", "embedding"):  # DDP: the same figures everywhere, those of one process
        for measure, values in history[name].items():
            for rank in (first, second):
                torch.testing.assert_close(rank["ddp"][0][name][measure], values, rtol=2e-5, atol=1e-6, msg=measure)
    for step in range(STEPS):  # sums of both are those of the whole
        for name, replicas in (("attention", "ddp"), ("output", "ddp"), ("attention", "fsdp")):
            one, two = (rank[replicas][1][step][name] for rank in (first, second))
            merged = [a + b for a, b in zip(one[:-1], two[:-1], strict=True)] + [torch.maximum(one[-1], two[-1])]
            for got, wanted in zip(merged, sums[step][name], strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        one, two = (rank["fsdp"][1][step]["weights"] for rank in (first, second))
        for part in (0, 1, 2):  # squares and products of shards
            torch.testing.assert_close(one[part] + two[part], sums[step]["weights"][part], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(one[3], sums[step]["weights"][3])
        assert one[5].isnan().all()  # no singular value of a shard
