"""Benchmarks and the fine-tuning example run; what they measure is for the README, not for a test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import __main__ as suite
from benchmarks import inference, monitor_overhead, peers, removal_ablation, slingshot, switch_study
from stabnorm.examples import finetune


@pytest.mark.slow
def test_the_overhead_benchmark_prints_a_row_for_each_preset(capsys: pytest.CaptureFixture[str]) -> None:
    monitor_overhead.main(["--rounds", "2", "--batch", "1"])
    printed = capsys.readouterr().out
    for preset in ("economy", "standard", "full", "attention", "weights", "embedding", "output"):
        assert f"| {preset} |" in printed
    assert "bare step:" in printed


def _tokens(batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randint(11, (batch, 7), device=device)


def _vit() -> nn.Module:
    model = monitor_overhead.ViT(6, 2)
    del model.blocks[2:]
    return model


TINY: dict[str, tuple[Callable[[], nn.Module], inference.Example]] = {
    "vit-tiny": (_vit, inference.MODELS["vit-tiny"][1]),
    "gpt2-small": (lambda: inference.GPT(vocabulary=11, dim=6, depth=2, heads=2), _tokens),
}


@pytest.mark.parametrize("name", inference.MODELS)
def test_what_is_folded_has_the_operations_of_the_network_without_norms(name: str) -> None:
    build, example = TINY[name]
    x = example(2, torch.device("cpu"), torch.float32)
    four = inference.variants(build(), x)
    counts = {label: inference.operations(model, x) for label, model in four.items()}
    assert counts["folded"] == counts["floor"]
    assert not [op for op in counts["folded"] if "norm" in op or "sqrt" in op or "var" in op]
    norms = sum(isinstance(module, nn.LayerNorm) for module in four["layer norm"].modules())
    assert counts["layer norm"] - counts["floor"] == {"layer_norm": norms}
    assert counts["switched"].total() > counts["floor"].total()


@pytest.mark.slow
def test_the_inference_benchmark_prints_a_row_for_each_variant(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(inference.MODELS, "gpt2-small", TINY["gpt2-small"])
    threads = str(torch.get_num_threads())
    few = ["--models", "gpt2-small", "--batch", "1", "--modes", "eager", "--rounds", "2", "--threads", threads]
    inference.main(few)
    printed = capsys.readouterr().out
    for dtype in ("float32", "bfloat16"):
        assert f"**gpt2-small**, {dtype}, eager, batch 1" in printed
    assert printed.count("| none |") == 2  # more operations than the floor: folded, and the floor itself
    for variant in ("layer norm", "switched", "folded", "floor"):
        assert printed.count(f"| {variant} | ") == 3  # the operations, and two latencies


@pytest.mark.slow
@pytest.mark.parametrize(("method", "switches"), [("linear", True), ("taper", True), ("DyT", False)])
def test_a_study_leaves_nothing_but_its_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, switches: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = switch_study.run(switch_study.Outcome("digits", "calm", method, seed=3, steps=4), None)
    assert outcome.error > 0
    assert (outcome.kept is not None) == switches
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.slow
def test_the_removal_ablation_ends_without_norms_and_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    runs = removal_ablation.main(["--tasks", "digits", "--seeds", "1", "--steps", "6", "--repair", "2", "--jobs", "1"])
    assert [run.norms for run in runs] == [9, 0, 0, 0]
    assert "| after: fit + repair | 1 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:The .* does not have many workers")
def test_fine_tuning_keeps_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finetune.main(["--root", "here", "--steps", "5", "--no-progress"])
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert (tmp_path / "here" / "layernorm.ckpt").exists()


HEADINGS = (
    "Kernels", "Norm modules, as they come", "Monitor, as they come",
    "Training step while norms are switched, as they come", "Memory", "Inference",
)  # fmt: skip
ROWS = (
    "| column moments | aten |", "| PRepBN, eager |", "| switching |", "| standard |", "| folded |", "| economy |"
)  # fmt: skip


@pytest.mark.slow
def test_make_bench_runs_every_section_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "page.md"
    suite.main(["--quick", "--device", "cpu", "--output", str(page)])
    written = page.read_text(encoding="utf-8")
    assert written in capsys.readouterr().out
    for heading in HEADINGS:
        assert f"## {heading}\n" in written
    for row in ROWS:
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
        assert len(peer.results) >= 2
        peer.step()
        peer.detach()
        model(torch.randn(5, 3)).sum().backward()
        assert peer.seconds == spent
        assert peer.results == []
        peer.close()


@pytest.mark.slow
def test_the_slingshot_benchmark_counts_leads_and_false_alarms_and_repeats_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = np.full(2000, 1e-3)
    losses[1500:1520] = 1.0
    (spike,) = slingshot.onsets(losses)
    assert 1500 < spike < 1510
    found = slingshot.Outcome("base", 10, 2000, 5, [spike], {"curvature": [300, 700, 750, 1100, 1400, spike + 20]})
    assert slingshot.leads(found, "curvature") == [spike - 1100]
    assert slingshot.false_alarms(found, "curvature") == 1

    few = ["--steps", "4", "--every", "1", "--seeds", "10", "--out", str(tmp_path / "runs.jsonl")]
    slingshot.main(few)
    slingshot.main(few)
    assert len(slingshot.read(tmp_path / "runs.jsonl")) == 1
    assert "| test | curvature, every 1 steps | 0 of 0 |" in capsys.readouterr().out
    samples = [(5 * i, value) for i, value in enumerate([0.0, 2.0, *[0.0] * 7, 2.0, 0.0, 2.0, 2.0])]
    assert slingshot.over(samples) == [55]
