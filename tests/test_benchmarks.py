"""Benchmarks and the fine-tuning example run; what they measure is for the README, not for a test."""

from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import monitor_overhead, peers, switch_study
from examples import finetune


def test_the_overhead_benchmark_prints_a_row_for_each_preset(capsys: pytest.CaptureFixture[str]) -> None:
    monitor_overhead.main(["--rounds", "2", "--batch", "1"])
    printed = capsys.readouterr().out
    for preset in ("economy", "standard"):
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


def test_make_bench_runs_every_section_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "page.md"
    suite.main(["--quick", "--device", "cpu", "--output", str(page)])
    written = page.read_text()
    assert written in capsys.readouterr().out
    for heading in ("Kernels", "Norm modules, as they come", "Monitor, as they come", "Memory", "Inference"):
        assert f"## {heading}\n" in written
    for row in ("| column moments | aten |", "| PRepBN, eager |", "| standard |", "| folded |", "| economy |"):
        assert row in written
    for peer in peers.peers(torch.nn.LayerNorm(2)):
        assert f"| {peer.name} |" in written
        peer.close()


def test_a_peer_looks_at_every_norm_and_leaves_nothing_behind() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.LayerNorm(4))
    for peer in peers.peers(model):
        peer.attach()
        model(torch.randn(5, 3)).sum().backward()
        spent = peer.seconds
        assert spent > 0
        assert len(peer.found) >= 2
        peer.step()
        peer.detach()
        model(torch.randn(5, 3)).sum().backward()
        assert peer.seconds == spent
        assert peer.found == []
        peer.close()
