"""The cost of a monitor: it is measured and printed, and the first step does not count."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor
from stabnorm.monitor.cost import Cost, Stopwatch


def test_it_says_what_it_costs() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16))
    with StabilityMonitor(model) as monitor:
        for _ in range(5):
            model(torch.randn(8, 6, 4)).square().mean().backward()
            monitor.step()
        monitor.flush()
    cost = monitor.cost
    assert cost.hooks > 0
    assert cost.step > 0
    assert cost.flush > 0
    assert cost.percent > 0
    assert "ms per step" in str(cost)


def test_the_first_step_is_no_part_of_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("stabnorm.monitor.cost.time", SimpleNamespace(perf_counter=lambda: clock))
    watch = Stopwatch()
    hooks = 0.0
    for number in range(5):
        clock += 0.100 if number else 7.0
        hooks += 0.002 if number else 3.0
        clock += 0.002 if number else 3.0
        began = watch.begin_step(hooks)
        clock += 0.001 if number else 5.0
        watch.end_step(began, hooks)
    assert watch.cost(hooks) == Cost(*map(pytest.approx, (2.0, 1.0, 0.0, 3.0)))  # type: ignore[arg-type]
    watch.flushes += 0.004
    assert watch.cost(hooks) == Cost(*map(pytest.approx, (2.0, 1.0, 1.0, 4.0)))  # type: ignore[arg-type]


def test_of_one_step_there_is_no_cost_to_say() -> None:
    watch = Stopwatch()
    watch.end_step(watch.begin_step(0.0), 0.0)
    assert str(watch.cost(0.0)) == "unknown: too few steps to say"
