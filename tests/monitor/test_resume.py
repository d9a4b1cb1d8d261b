"""What is saved is what no record has yet, and resumed it goes on to the same numbers, each step once."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor
from stabnorm.monitor.record import FileRecord, read_record
from tests.monitor import killed_run

STEPS, FLUSH_EVERY = 36, 10
BURSTS, NAN = (3, 23, 33), 24


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8))


def run(net: nn.Module, monitor: StabilityMonitor, steps: range) -> None:
    monitor.attach()
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        net.zero_grad()
        x = torch.randn(33, 4, generator=generator) * (40 if step in BURSTS else 1)
        if step == NAN:
            x[0, 0] = torch.nan
        net(x).square().mean().backward()
        monitor.step(loss=float(step))


def stored(state: dict[str, Any]) -> Any:
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.fixture(scope="module")
def whole() -> StabilityMonitor:
    net = model()
    monitor = StabilityMonitor(net, flush_every=FLUSH_EVERY)
    run(net, monitor, range(STEPS))
    monitor.flush()
    return monitor


def assert_goes_on(monitor: StabilityMonitor, whole: StabilityMonitor, first: int) -> None:
    assert monitor.history_steps().tolist() == list(range(first, STEPS))
    for name, values in whole.history().items():
        torch.testing.assert_close(monitor.history()[name], values[first:], rtol=0, atol=0, equal_nan=True)
    assert str(monitor.alerts) == str(whole.alerts)  # a NaN is not equal to itself
    assert len(monitor.alerts) >= 2


@pytest.mark.parametrize(("middle", "flush_every"), [(24, 10), (25, 3), (29, 50), (30, 10)])
def test_resumed_in_mid_window_it_goes_on_to_the_same_numbers_and_alerts(
    whole: StabilityMonitor, middle: int, flush_every: int
) -> None:
    net = model()
    first = StabilityMonitor(net, flush_every=FLUSH_EVERY)
    run(net, first, range(middle))
    state = stored(first.state_dict())
    assert len(state["rows"]) == middle % FLUSH_EVERY
    run(net, first, range(middle, middle + 2))  # what came after the checkpoint is lost with the process
    again = model()
    second = StabilityMonitor(again, flush_every=flush_every)
    second.load_state_dict(state)
    run(again, second, range(middle, STEPS))
    assert_goes_on(second, whole, middle // FLUSH_EVERY * FLUSH_EVERY)


def test_saving_writes_nothing_and_flushes_nothing(tmp_path: Path) -> None:
    net = model()
    monitor = StabilityMonitor(net, flush_every=20)
    monitor.records.append(record := FileRecord(tmp_path))
    run(net, monitor, range(27))
    files = sorted(os.listdir(tmp_path))
    sizes = [monitor.state_dict()["rows"].shape[0] for _ in range(2)]
    assert sizes == [7, 7]
    assert sorted(os.listdir(tmp_path)) == files
    assert read_record(tmp_path).steps.tolist() == list(range(20))
    record.close()


def test_the_state_does_not_grow_with_the_run() -> None:
    net, sizes = model(), []
    monitor = StabilityMonitor(net, flush_every=10)
    for start in (0, 25, 75):
        run(net, monitor, range(start, start + 25 if start == 0 else start + 50))
        sizes.append(sum(value.numel() for value in tensors(monitor.state_dict())))
    assert sizes[0] == sizes[1] == sizes[2]


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for part in parts for tensor in tensors(part)]


def test_gone_back_in_the_same_monitor_its_history_has_each_step_once(tmp_path: Path) -> None:
    net = model()
    monitor = StabilityMonitor(net, flush_every=10)
    monitor.records.append(FileRecord(tmp_path))
    run(net, monitor, range(17))
    state = monitor.state_dict()
    run(net, monitor, range(17, 33))
    monitor.load_state_dict(state)
    run(net, monitor, range(17, 40))
    assert monitor.history_steps().tolist() == list(range(10, 40))
    monitor.records[0].close()
    record = read_record(tmp_path)
    assert record.steps.tolist() == list(range(40))
    assert record.series["loss"].tolist() == list(range(40))


@pytest.mark.slow
def test_killed_twenty_times_nothing_that_was_flushed_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", killed_run.__name__, str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 20
