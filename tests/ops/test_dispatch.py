"""What may run where: the setting, what it does, and the record of devices on which kernels passed their tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stabnorm.ops
from stabnorm import StabilityMonitor
from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm
from stabnorm.ops import dispatch, tested, use_kernels
from stabnorm.ops.dispatch import all_ops
from stabnorm.ops.rows import moments_of_rows

CUDA = ("triton", "moments_of_rows", "cuda", 0)
GPU = torch.device("cuda", 0)


def test_an_unknown_setting_names_the_known_ones() -> None:
    before = dispatch.kernels()
    with pytest.raises(ValueError, match=r"kernels='fast' is unknown\. Choose one of 'auto', 'aten', "):
        use_kernels("fast")
    assert dispatch.kernels() == before


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["fast", "reference"])
def test_the_environment_variable_is_read_at_import(setting: str) -> None:
    code = "from stabnorm.ops import dispatch; print(dispatch.kernels())"
    environment = os.environ | {"STABNORM_KERNELS": setting}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    output = ran.stderr if setting == "fast" else ran.stdout
    assert ("STABNORM_KERNELS='fast' is unknown" if setting == "fast" else "reference\n") in output


def test_a_setting_holds_until_the_block_ends() -> None:
    before = dispatch.kernels()
    with pytest.raises(ZeroDivisionError), use_kernels("reference"):
        print(1 / (dispatch.kernels() != "reference"))
    assert dispatch.kernels() == before


def test_reference_runs_the_formulas_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_called(*_: object, **__: object) -> None:
        raise AssertionError("a faster backend ran")

    for op in all_ops():
        for backend in op.backends:
            monkeypatch.setitem(op._runs, backend, not_called)
    norms = [RepBN(8), UnifiedNorm(8), PowerNorm(8), PRepBN(8), nn.LayerNorm(8)]
    model = nn.Sequential(*norms)
    x = torch.randn(4, 5, 8, requires_grad=True)

    def train() -> None:
        with StabilityMonitor(model) as monitor:
            model(x).backward(torch.randn(4, 5, 8))
            monitor.step()

    with use_kernels("reference"):
        train()
    with use_kernels("aten"), pytest.raises(AssertionError, match="a faster backend ran"):
        train()


def test_backends_says_what_runs_and_why() -> None:
    with use_kernels("aten"):
        lines = {line.op: line for line in stabnorm.ops.backends(["cpu"])}
    assert set(lines) == {op.name for op in all_ops()}
    assert lines["add_moments_"].runs == "aten"
    with use_kernels("reference"):
        table = stabnorm.ops.backends()
    assert {line.runs for line in table} == {"reference"}
    assert "STABNORM_KERNELS is reference" in str(table)
    assert len(str(table).splitlines()) == len(table)


def test_what_no_backend_takes_is_left_to_the_formula() -> None:
    with use_kernels("aten"):
        assert moments_of_rows.chosen(torch.ones(2, 2)) == "aten"
        assert moments_of_rows.chosen(torch.ones(2, 2), torch.ones(2, dtype=torch.bool)) == "reference"
        assert moments_of_rows.chosen(torch.ones(2, 2).double()) == "reference"
        assert moments_of_rows.chosen(torch.ones(0, 2)) == "reference"
        assert moments_of_rows.chosen(torch.ones(2, 2, device="meta")) == "reference"


# --- the record ---


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A GPU that is there as far as the record is concerned."""
    own = {"device": "some GPU", "capability": "9.0", "torch": "2", "triton": "3", "kernels": "abc"}
    monkeypatch.setenv("STABNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tested, "fingerprint", lambda device: own)
    monkeypatch.setattr(tested, "has_triton", lambda: True)
    tested.read_again()
    return own


@pytest.mark.usefixtures("gpu")
def test_a_kernel_is_trusted_once_its_tests_passed_on_the_device() -> None:
    assert dispatch.why_not("auto", *CUDA) == (
        "was not tested on some GPU with these versions: `python -m stabnorm.ops.selftest` does it"
    )
    assert dispatch.why_not("triton", *CUDA) is None
    tested.record(GPU, ["moments_of_rows"])
    assert dispatch.why_not("auto", *CUDA) is None
    assert dispatch.why_not("auto", "triton", "sums_of_rows", "cuda", 0) is not None
    tested.record(GPU, [])  # tested again, and it failed
    assert dispatch.why_not("auto", *CUDA) is not None


@pytest.mark.parametrize("part", ["device", "capability", "torch", "triton", "kernels"])
def test_a_record_of_something_else_does_not_count(gpu: dict[str, str], part: str) -> None:
    path = tested.record(GPU, ["moments_of_rows"])
    gpu[part] = "another"
    assert dispatch.why_not("auto", *CUDA) is not None
    tested.record(GPU, ["moments_of_rows"])
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 2  # neither is lost


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("text", ["", "{", "{}", '[1, {"device": 3}]'])
def test_a_spoilt_record_is_no_record(text: str) -> None:
    path = tested.record(GPU, ["moments_of_rows"])
    path.write_text(text, encoding="utf-8")
    tested.read_again()
    assert dispatch.why_not("auto", *CUDA) is not None
    tested.record(GPU, ["moments_of_rows"])
    assert dispatch.why_not("auto", *CUDA) is None


def test_the_record_that_ships_can_be_read() -> None:
    assert isinstance(json.loads(tested.SHIPPED.read_text(encoding="utf-8")), list)


def test_triton_runs_on_a_cpu_only_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = ("triton", "moments_of_rows", "cpu", None)
    monkeypatch.setattr(tested, "has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.why_not("triton", *on_cpu) == "is for GPUs"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.why_not("triton", *on_cpu) is None
    assert dispatch.why_not("auto", *on_cpu) == "is for GPUs"
