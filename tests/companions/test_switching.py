"""Readiness is the gate's view of a layer, the gap is that of the branches, and the monitor knows neither."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stabnorm.monitor
from stabnorm import StabilityMonitor
from stabnorm.companions.switching import BranchGap, SwitchCompanion
from stabnorm.monitor.statistics import resolve
from stabnorm.nn import PRepBN


def test_the_gap_is_that_of_the_branches_every_fourth_step() -> None:
    torch.manual_seed(0)
    norm = PRepBN(8)
    nn.init.normal_(norm.rep.weight)
    model = nn.Sequential(nn.LayerNorm(8), norm)
    gap = BranchGap([norm])
    gap.attach()
    gap.armed = True
    expected = []
    with StabilityMonitor(model, companions=["switch"]) as monitor:
        for _ in range(9):
            model(torch.randn(32, 8))
            monitor.step()
            expected.append(float(gap.take()))
    gap.detach()
    measured = monitor.companions["switch"].history()["switch_gap"]
    assert torch.isnan(measured[:, 0]).all()
    assert measured[:, 1].isnan().tolist() == [step % 4 > 0 for step in range(9)]
    assert measured[::4, 1].tolist() == pytest.approx(expected[::4], rel=1e-5)


def watched(inputs: dict[str, Any], preset: Any = ("affine_residual",), **options: Any) -> StabilityMonitor:
    layers = nn.ModuleDict({"plain": nn.LayerNorm(32), "heavy": nn.LayerNorm(32), "batch": nn.BatchNorm1d(32)})
    with StabilityMonitor(layers, preset, companions=["switch"], **options) as monitor:
        for name, x in inputs.items():
            layers[name](x)
        monitor.step()
    return monitor


def inputs() -> dict[str, Any]:
    torch.manual_seed(0)
    plain = torch.randn(500, 32)
    heavy = plain * torch.randn(500, 1).mul(1.5).exp()
    return {"plain": plain, "heavy": heavy, "batch": heavy}


def test_readiness_is_1_where_the_gate_runs_a_layer_and_0_where_it_holds_one() -> None:
    monitor = watched(inputs())
    assert monitor.history()["affine_residual"][0, 1] > 0.5
    assert monitor.companions["switch"].history()["switch_readiness"][0].tolist() == [1, 0, 1]


def test_readiness_needs_no_statistic_of_the_monitor() -> None:
    readiness = watched(inputs(), "economy").companions["switch"].history()["switch_readiness"]
    assert readiness[0].tolist() == [1, 0, 1]


def test_a_norm_that_the_monitor_leaves_out_or_that_did_not_run_has_no_readiness() -> None:
    few = watched(inputs(), exclude="heavy").companions["switch"]
    assert few.rows == ("plain", "heavy", "batch")
    assert few.history()["switch_readiness"].isnan().tolist() == [[False, True, False]]
    some = {name: x for name, x in inputs().items() if name != "batch"}
    assert watched(some).companions["switch"].history()["switch_readiness"].isnan().tolist() == [[False, False, True]]


def test_readiness_rests_on_the_average_that_a_checkpoint_keeps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8))

    def steps(monitor: StabilityMonitor, few: range) -> None:
        with monitor:
            for step in few:
                torch.manual_seed(step)
                model(torch.randn(64, 8) * torch.randn(64, 1).exp())
                monitor.step()

    whole, first, second = (StabilityMonitor(model, companions=["switch"]) for _ in range(3))
    steps(whole, range(8))
    steps(first, range(5))
    second.load_state_dict(first.state_dict())
    steps(second, range(5, 8))
    readiness = [m.companions["switch"].history()["switch_readiness"] for m in (whole, second)]
    assert torch.equal(readiness[0][5:], readiness[1][-3:])
    residual = whole.history()["affine_residual"][:, 0].double()
    average = residual[0]
    for value in residual[1:]:
        average = torch.lerp(average, value, 0.1)
    assert float(readiness[0][-1]) == pytest.approx(float(((0.5 - average) / 0.2).clamp(0, 1)), abs=1e-5)


def test_it_says_where_nothing_is_to_be_watched_and_where_its_statistics_are() -> None:
    with pytest.raises(ValueError, match="no normalization layer found in LayerNorm under include='nothing'"):
        SwitchCompanion(include="nothing").watch(nn.LayerNorm(4))
    for name in ("switch_gap", "update_ratio"):
        with pytest.raises(ValueError, match=rf"'{name}' is not in the catalogue: ask for companions=\['\w+'\]"):
            resolve(["amax", name])


def test_the_monitor_imports_nothing_of_progressive_norms() -> None:
    for file in Path(str(stabnorm.monitor.__file__)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and str(node.module).startswith("stabnorm.nn")), file
