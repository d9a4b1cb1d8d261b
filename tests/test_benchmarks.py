"""Benchmarks and the fine-tuning example run; what they measure is for the README, not for a test."""

from pathlib import Path

import pytest

from benchmarks import monitor_overhead, switch_study
from examples import finetune


def test_the_overhead_benchmark_prints_a_row_for_each_preset(capsys: pytest.CaptureFixture[str]) -> None:
    monitor_overhead.main(["--rounds", "2", "--batch", "1"])
    printed = capsys.readouterr().out
    for preset in ("economy", "standard", "attention", "weights", "embedding", "output"):
        assert f"| {preset} |" in printed
    assert "bare step:" in printed


def test_a_study_leaves_nothing_but_its_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = switch_study.run(switch_study.Outcome("digits", "calm", "linear", seed=3, steps=4), None)
    assert outcome.error > 0
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:The .* does not have many workers")
def test_fine_tuning_keeps_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finetune.main(["--root", "here", "--steps", "5", "--no-progress"])
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert (tmp_path / "here" / "layernorm.ckpt").exists()
