"""Kernels are admitted by their self-test, which runs by itself and once."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor
from stabnorm.nn import RepBN
from stabnorm.ops import admission, dispatch, tested, use_kernels
from stabnorm.ops.blended import blended_norm
from stabnorm.ops.moments import add_moments_
from stabnorm.ops.rows import moments_of_rows

CPU = torch.device("cpu")
ROWS = torch.ones(2, 2)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine on which nothing was tested, and the setting that users have."""
    monkeypatch.setenv("STABNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(admission, "_running", {})
    tested.read_again()
    with use_kernels("auto"):
        yield tmp_path / "cache"
    tested.read_again()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been started."""
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: object) -> None:
            commands.append(command)
            self.lock = Path(command[-1])

        def poll(self) -> int | None:
            return None if self.lock.exists() else 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    return commands


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="needs a C++ compiler")
def test_the_first_run_on_a_machine_builds_and_tests_and_the_next_one_is_fast(cache: Path) -> None:
    code = """
import torch
from torch import nn
from stabnorm import StabilityMonitor
from stabnorm.ops import admission
from stabnorm.ops.blended import blended_norm
from stabnorm.ops.moments import add_moments_
from stabnorm.ops.rows import moments_of_rows
model, state = nn.Sequential(nn.LayerNorm(8)), torch.get_rng_state()
with StabilityMonitor(model) as monitor:
    assert torch.equal(torch.get_rng_state(), state)
    def step():
        model(torch.ones(4, 8)); monitor.step(); monitor.flush()
        return add_moments_.chosen(torch.ones(2, 2)), moments_of_rows.chosen(torch.ones(2, 2))
    first = step()
    admission.wait(torch.device("cpu"), 200)
    print(*first, *step())
"""
    environment = os.environ | {"STABNORM_KERNELS": "auto", "PYTHONPATH": str(Path(dispatch.__file__).parents[2])}

    def run() -> str:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert run() == "aten aten cpp aten"  # what observes takes over at once; what trains keeps its bits
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".sha256", ".so"]  # the lock is gone
    assert run() == "cpp cpp cpp cpp"


def test_of_several_processes_that_start_together_one_tests(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        monkeypatch.setattr(admission, "_running", {})  # another process
        admission.start(CPU)
    assert len(started) == 1


def test_one_process_asks_once_and_the_lock_of_a_killed_one_does_not_last(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    admission.start(CPU)
    admission.start(CPU)
    assert len(started) == 1
    lock = Path(started[0][-1])
    long_ago = time.time() - admission.STALE_SECONDS - 1
    os.utime(lock, (long_ago, long_ago))
    monkeypatch.setattr(admission, "_running", {})
    admission.start(CPU)
    assert len(started) == 2


def test_what_was_tested_is_not_tested_again(started: list[list[str]]) -> None:
    tested.record(CPU, [])
    admission.start(CPU)
    assert started == []


def test_attaching_a_monitor_and_the_first_forward_of_a_norm_start_it(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with StabilityMonitor(nn.Sequential(nn.LayerNorm(8))):
        assert len(started) == 1
    Path(started[0][-1]).unlink()
    monkeypatch.setattr(admission, "_running", {})
    dispatch.forget_choices()
    RepBN(8)(torch.randn(4, 8))
    assert len(started) == 2


@pytest.mark.parametrize("setting", ["aten", "reference"])
def test_other_settings_start_nothing(started: list[list[str]], setting: str) -> None:
    with use_kernels(setting), StabilityMonitor(nn.Sequential(nn.LayerNorm(8))):
        RepBN(8)(torch.randn(4, 8))
    assert started == []


def test_a_backend_that_failed_its_self_test_does_not_run_and_the_table_says_why() -> None:
    tested.record(CPU, ["add_moments_"])
    assert "failed its self-test here" in str(dispatch.why_not("auto", "cpp", "moments_of_rows", "cpu", None))
    assert moments_of_rows.chosen(ROWS) == "aten"
    tested.record(CPU, [], why="no C++ compiler found")
    lines = {line.op: line for line in dispatch.backends(["cpu"])}
    assert "no C++ compiler found" in lines["add_moments_"].why


def test_a_compiled_graph_gets_the_formula_so_that_its_layer_norm_has_the_bits_of_the_graphs_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stabnorm.ops.cpp.library.why_not", lambda: None)
    tested.record(CPU, [op.name for op in dispatch.all_ops()])
    assert dispatch._choose(blended_norm, "auto", "cpu", None, False, True, in_graph=False) == "cpp"
    assert dispatch._choose(blended_norm, "auto", "cpu", None, False, True, in_graph=True) == "reference"
    assert dispatch._choose(blended_norm, "cpp", "cpu", None, False, True, in_graph=True) == "cpp"


def test_only_ops_that_observe_change_their_backend_while_a_model_trains(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stabnorm.ops.cpp.library.why_not", lambda: None)
    assert (add_moments_.chosen(ROWS), moments_of_rows.chosen(ROWS)) == ("aten", "aten")
    dispatch.look_again()
    passed = [op.name for op in dispatch.all_ops()]
    write_as_another_process(passed)
    Path(started[0][-1]).unlink()
    dispatch.look_again()
    assert (add_moments_.chosen(ROWS), moments_of_rows.chosen(ROWS)) == ("cpp", "aten")


def write_as_another_process(passed: list[str]) -> None:
    listeners = list(tested.on_change)
    tested.on_change.clear()
    tested.record(CPU, passed)
    tested.on_change.extend(listeners)


def test_a_cache_that_cannot_be_written_is_said_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("STABNORM_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, logger="stabnorm"):
        assert moments_of_rows.chosen(ROWS) == "aten"
    assert "the self-test of the kernels for cpu could not start" in caplog.text


def test_a_gpu_is_waited_for_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(admission, "start", lambda device: calls.append(("start", device.type)))
    monkeypatch.setattr(admission, "wait", lambda device: calls.append(("wait", device.type)))
    monkeypatch.setattr(tested, "has_triton", lambda: True)
    dispatch.admit(torch.device("cuda", 0))
    dispatch.admit(CPU)
    assert calls == [("start", "cuda"), ("wait", "cuda"), ("start", "cpu")]
    monkeypatch.setattr(tested, "has_triton", lambda: False)
    dispatch.admit(torch.device("cuda", 0))
    assert len(calls) == 3


def test_waiting_ends_with_the_lock_of_whichever_process_tests(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    lock = admission._lock_of(CPU)
    lock.touch()
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > 50:
            lock.unlink()

    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    admission.wait(CPU, 30)
    assert 30 <= clock[0] < 31
    admission.wait(CPU, 300)
    assert 50 < clock[0] < 51


def test_a_lock_that_a_killed_process_has_left_is_not_waited_for_where_the_kernels_were_tested(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    admission._lock_of(CPU).touch()
    monkeypatch.setattr("stabnorm.ops.tested.entry_for", lambda device: {"passed": []})
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    admission.wait(CPU, 30)


def test_a_self_test_that_has_removed_its_lock_may_still_be_about_to_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        monkeypatch.setattr(admission, "_running", {CPU: process})
        assert admission.ended()  # no lock: it has recorded its result
        assert process.poll() is None
        assert admission._leaving == [process]
        process.communicate(b"\n")
        assert not admission.ended()
        assert admission._leaving == []
