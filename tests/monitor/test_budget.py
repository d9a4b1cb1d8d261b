"""Under a budget the costly statistics are measured at every k-th step, and nothing else changes."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor, Statistic
from stabnorm.callbacks import StabilityCallback
from stabnorm.dashboard.runs import between_measurements
from stabnorm.monitor.budget import RAREST, Budget, dear_statistics
from stabnorm.monitor.record import FileRecord, read_record
from stabnorm.monitor.statistics import CATALOGUE, resolve
from tests.monitor.test_resume import stored

STEPS, EVERY = 20, 4
REMEMBER = {s.name for s in CATALOGUE.values() if s.remembers}


class Clock:
    """Steps of one second."""

    bare, flush = 1.0, 0.0


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8))


def run(net: nn.Module, monitor: StabilityMonitor, steps: range) -> None:
    monitor.attach()
    for step in steps:
        net.zero_grad()
        for part in torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(step)):  # two micro-batches
            net(part).square().mean().backward()
        monitor.step(loss=1.0)
    monitor.detach()


@pytest.fixture
def every_fourth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "_wanted", lambda budget, room: EVERY)


def test_what_raises_alerts_is_never_spared() -> None:
    spared = dear_statistics(resolve("full"))
    assert dear_statistics(resolve("standard")) == {"affine_residual"} <= spared
    assert dear_statistics(resolve("economy")) == frozenset()
    assert {"max_to_median", "massive_activation", "effective_samples", "outlier_dims", "nonfinite_count"} <= spared
    for name, statistic in CATALOGUE.items():
        if statistic.alarm is not None or statistic.floor is not None or statistic.axis in ("gradient", "token"):
            costly = statistic.needs_all & {"token_shape", "normalized"}
            assert name not in spared or costly or statistic.remembers, name
    own = [Statistic(name, compute=lambda now, past: now.var_n.sum(-1), needs="normalized", alarm=alarm)
           for name, alarm in (("calm", None), ("loud", 1.0))]  # fmt: skip
    assert dear_statistics(own) == frozenset()  # the data are there at every step
    assert dear_statistics(own[:1]) == {"calm"}


@pytest.mark.usefixtures("every_fourth")
@pytest.mark.parametrize("preset", ["standard", "full"])
def test_only_the_costly_ones_are_spared_and_all_others_are_as_without_a_budget(preset: str) -> None:
    net = small()
    plain, kept = (StabilityMonitor(net, preset, budget=budget, flush_every=6) for budget in (None, 0.02))
    run(net, plain, range(STEPS))
    run(net, kept, range(STEPS))
    spared, measured = dear_statistics(kept.statistics), [*range(8), *range(8, STEPS, EVERY)]
    between = sorted(set(range(STEPS)) - set(measured))
    whole, part = plain.history(), kept.history()
    for name, values in whole.items():
        if name not in spared:
            torch.testing.assert_close(part[name], values, rtol=0, atol=0, equal_nan=True, msg=name)
            continue
        assert part[name][between].isnan().all(), name
        if name not in REMEMBER:
            torch.testing.assert_close(part[name][measured], values[measured], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.usefixtures("every_fourth")
def test_k_is_in_the_record_and_between_measurements_charts_hold_the_last_value(tmp_path: Path) -> None:
    net = small()
    monitor = StabilityMonitor(net, budget=0.02, flush_every=5)
    monitor.records.append(writer := FileRecord(tmp_path))
    run(net, monitor, range(STEPS))
    monitor.flush()
    writer.close()
    record = read_record(tmp_path)
    assert record.series["measured_every"].tolist() == [1] * 8 + [EVERY] * (STEPS - 8)
    values = record.series["affine_residual"]
    shown = between_measurements(values, record.series["measured_every"], record.steps)
    assert not np.isnan(shown).any()
    assert (shown[9:12] == values[8]).all()
    assert (shown[12] == values[12]).all()


def test_a_value_that_was_lost_where_it_was_measured_stays_lost() -> None:
    values = np.array([1, 2, np.nan, np.nan, np.nan, 3], np.float32)[:, None]
    every = np.array([1, 1, 2, 2, 2, 2], np.float32)
    shown = between_measurements(values, every, np.arange(6))
    assert shown.ravel().tolist()[:2] == [1, 2]
    assert np.isnan(shown[2:5]).all()
    assert shown[5] == 3
    assert between_measurements(values, np.full(6, np.nan, np.float32), np.arange(6)) is values


@pytest.mark.usefixtures("every_fourth")
def test_a_resumed_run_measures_at_the_same_steps() -> None:
    net = small()
    first = StabilityMonitor(net, budget=0.02)
    run(net, first, range(10))
    state = stored(first.state_dict())
    run(net, first, range(10, STEPS))
    second = StabilityMonitor(net, budget=0.02)
    second.load_state_dict(state)
    run(net, second, range(10, STEPS))
    torch.testing.assert_close(second.history()["affine_residual"], first.history()["affine_residual"], equal_nan=True)
    without = StabilityMonitor(net)
    without.load_state_dict(state)
    run(net, without, range(10, 14))
    assert not without.history()["affine_residual"][10:].isnan().any()
    older = {name: part for name, part in state.items() if name != "budget"} | {"scalars": state["scalars"][:, :2]}
    second.load_state_dict(older)
    assert second.history()["amax"].shape[0] == 10


def every_after(steps: int, cost: Callable[[bool], float], share: float = 0.02) -> int:
    budget, spent = Budget(share, lambda every: every), 0.0
    for step in range(steps):
        spent += cost(budget.is_due(step))
        budget.note(spent)
        budget.decide(step + 1, Clock)  # type: ignore[arg-type]
    return budget.every


def test_k_is_the_least_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    assert every_after(50, lambda dear: 0.015) == 1
    assert every_after(50, lambda dear: 0.025 if dear else 0.001) == 2
    assert every_after(50, lambda dear: 0.095 if dear else 0.010) == 9
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "stabnorm"):
        assert every_after(200, lambda dear: 0.100 if dear else 0.030) == RAREST
        assert every_after(200, lambda dear: 0.1) == 1  # rarer measurements would save nothing
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [
        " watching cannot be kept within budget=0.02"
    ] * 2


def test_all_ranks_take_the_k_of_the_first() -> None:
    budget = Budget(0.02, lambda every: 7)
    budget.note(0.1)
    budget.decide(8, Clock)  # type: ignore[arg-type]
    assert budget.every == 7


def watched(budget: Any) -> StabilityMonitor:
    return StabilityMonitor(small(), budget=budget)


def called_back(budget: Any) -> StabilityCallback:
    return StabilityCallback(budget=budget)


@pytest.mark.parametrize("of", [watched, called_back])
def test_a_budget_that_is_no_share_is_refused(of: Any) -> None:
    with pytest.raises(ValueError, match="budget"):
        of(0)
    with pytest.raises(TypeError, match="budget"):
        of("2 %")
