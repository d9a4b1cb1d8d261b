"""The monitor on a CUDA device: `pytest -m gpu`. Skipped where there is none."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu_step import Steps
from stabnorm import StabilityMonitor, valid_tokens
from stabnorm._models import masks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.RMSNorm(64),
        nn.LayerNorm(64, elementwise_affine=False), nn.Linear(64, 8),
    )  # fmt: skip


def train(net: nn.Module, monitor: StabilityMonitor, steps: int, device: str, *, watch_syncs: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 33, 64, generator=generator).to(device) for _ in range(steps)]
    mask = (torch.rand(16, 33, generator=generator) < 0.8).to(device)
    upstream = torch.randn(16, 33, 8, generator=generator).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0, foreach=False)  # moments, but weights that stay the same
    for number, batch in enumerate(batches):
        if watch_syncs and number == 2:  # the first steps allocate
            torch.cuda.set_sync_debug_mode("error")
        optimizer.zero_grad()
        with valid_tokens(mask):
            net(batch).backward(upstream)
        optimizer.step()
        monitor.step(loss=batch.mean(), optimizer=optimizer)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("preset", ["standard", "full"])
def test_monitored_steps_never_wait_for_the_device(preset: str) -> None:
    net = model().cuda()
    with StabilityMonitor(net, preset, flush_every=100) as monitor:
        train(net, monitor, 40, "cuda", watch_syncs=True)
    assert monitor.history()["amax"].shape == (40, 3)


def test_a_step_launches_at_most_twelve_kernels_and_copies() -> None:
    steps = Steps(25, 384, "triton", torch.device("cuda"))
    steps.timed()  # which compiles
    launches = steps.launches()
    steps.monitor.detach()
    if not launches:
        pytest.skip("the profiler may not look at this device")
    assert launches <= 12


@pytest.mark.parametrize("preset", ["standard", "full"])
def test_the_history_is_that_of_the_cpu(preset: str) -> None:
    histories: list[dict[str, Tensor]] = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = model().to(device)
        with StabilityMonitor(net, preset, flush_every=7) as monitor:
            train(net, monitor, 20, device)
        histories.append(monitor.history())
    for name, values in histories[0].items():
        torch.testing.assert_close(histories[1][name], values, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_model_moved_after_the_monitor_was_attached_is_followed() -> None:
    net = model()
    with StabilityMonitor(net, flush_every=7) as monitor:
        train(net, monitor, 3, "cpu")
        net.cuda()
        train(net, monitor, 10, "cuda")
    assert monitor.history()["tokens"].min() > 0
    assert torch.isfinite(monitor.history()["mean_discrepancy"][1:]).all()


def test_a_mask_on_the_gpu_is_not_read_when_its_context_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_unasked", 10)
    monkeypatch.setattr(masks, "_noted", [])
    mask = torch.arange(6, device="cuda") < 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        with valid_tokens(mask):
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.warns(UserWarning, match="leaves out 67 % of the tokens"):
        masks.ask_about_masks()
