"""The benchmarks for a GPU run from end to end without one, on tiny models; what they measure there means nothing."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_kernels


@pytest.mark.slow
def test_every_stage_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # or kernels would run on the CPU
    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(gpu, "WARM_UP", 1)
    out = tmp_path / "gpu.md"
    assert gpu.main(["--smoke", "--rounds", "2", "--out", str(out)]) == 0
    written = out.read_text(encoding="utf-8")
    for heading in gpu.STAGES:
        assert f"\n## {heading}\n" in written
        assert f"\n({heading} took " in written
    for line in (
        "| LayerNorm | torch |",
        "| LayerNorm, monitored: kernels |",
        "| switched: kernels |",
        "| folded |",
        "| 2 x 24 | kernels |",
    ):
        assert line in written


def test_a_stage_that_fails_is_told_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.STAGES, "kernels", lambda options: iter([str(1 / 0)]))
    out = tmp_path / "gpu.md"
    assert gpu.main(["--smoke", "--stages", "kernels", "tests", "--out", str(out)]) == 1
    assert "ZeroDivisionError" in out.read_text(encoding="utf-8")
    assert "## tests" in out.read_text(encoding="utf-8")


def test_sections_are_printed_as_they_come_until_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(options: gpu.Options) -> Iterator[str]:
        yield "the first table"
        assert capsys.readouterr().out.endswith("the first table\n")
        assert "the first table" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
        options.until = 0.0
        yield "the second table"
        yield "the third table"

    monkeypatch.setitem(gpu.STAGES, "kernels", stage)
    assert gpu.main(["--smoke", "--stages", "kernels", "--out", str(tmp_path / "gpu.md")]) == 0
    written = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "the second table\n\nThe time is over" in written
    assert "the third table" not in written


@pytest.mark.slow
def test_a_command_speaks_as_it_runs_and_is_ended_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    code = "print('collected', flush=True); import time; time.sleep(600)"
    ended = gpu._run([sys.executable, "-c", code], time.monotonic() + 5)
    assert "did not end in time" in ended
    assert gpu._run([sys.executable, "-c", "print(1)"], time.monotonic() + 300) == "exit code 0\n\n```\n1\n```"
    assert capsys.readouterr().out.endswith("1\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_pretends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.md")]) == 1
    assert "there is no CUDA device" in capsys.readouterr().err


def test_figures_become_a_table() -> None:
    everybody = [
        gpu_kernels.Contender("moments", "kernel", 1, lambda x, dy: None, [1e-5, 1.1e-5, 1.2e-5]),
        gpu_kernels.Contender("LayerNorm", "torch", 5, lambda x, dy: None, [5e-5, 5e-5, 6e-5]),
        gpu_kernels.Contender("LayerNorm", "apex", 5, lambda x, dy: None, trouble="ImportError: no"),
    ]
    table = gpu_kernels.table(everybody, 11_000_000, 2e12)
    assert "| moments | kernel | 11.0 (10.0 to 12.0) | 50 |  |" in table
    assert "| LayerNorm | torch | 50.0 (50.0 to 60.0) | 55 | 1.00 |" in table
    assert "| LayerNorm | apex | ImportError: no | | |" in table
