"""Companions on a CUDA device: `pytest -m gpu`. Skipped where there is none."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stabnorm import StabilityMonitor
from tests.companions.nets import Fused, MultiHead, Text, loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

COMPANIONS = ("attention", "weights", "embedding", "output")


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def train(device: str, *, watch_syncs: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Text(Fused(), MultiHead(False), MultiHead(True)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # Adam would blow up the key bias's rounding noise
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(13, (4, 7), generator=generator).to(device) for _ in range(12)]
    with StabilityMonitor(model, flush_every=50, companions=COMPANIONS) as monitor:
        for number, tokens in enumerate(batches):
            if watch_syncs and number == 2:  # the first steps allocate
                torch.cuda.set_sync_debug_mode("error")
            optimizer.zero_grad()
            loss(model, tokens).backward()
            optimizer.step()
            monitor.step()
        torch.cuda.set_sync_debug_mode("default")
        return {name: v for track in monitor.companions.values() for name, v in track.history().items()}


@pytest.mark.usefixtures("no_sync")
def test_companions_never_wait_for_the_device() -> None:
    assert train("cuda", watch_syncs=True)["attention_entropy"].shape == (12, 9)


def test_figures_are_those_of_the_cpu() -> None:
    here, on_gpu = train("cpu"), train("cuda")
    for name, values in here.items():
        torch.testing.assert_close(on_gpu[name], values, rtol=1e-3, atol=1e-4, msg=name)
