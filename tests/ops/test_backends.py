"""Every backend equals its formula in float64 within one table by dtype; so do the modules, both ways."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm
from stabnorm.ops import dispatch, tested, use_kernels
from stabnorm.ops.cpp import library
from stabnorm.ops.dispatch import Op, all_ops
from stabnorm.ops.rows import affine_of_rows
from stabnorm.ops.selftest import TOLERANCES, Case, Check, backends_of, cases, checks_of, compare, failures, truth
from stabnorm.ops.selftest.__main__ import main

CPU = torch.device("cpu")


CHECKS = {check: op for op in all_ops() for check in checks_of(op)}  # ops that are compared together count once


@pytest.mark.parametrize("check", list(CHECKS), ids=[op.name for op in CHECKS.values()])
def test_every_backend_of_an_op_equals_its_formula(check: Check) -> None:
    for case in cases(CPU, small=True):
        right = truth(check, case)
        for backend in backends_of(CHECKS[check], CPU):
            if backend == "triton":  # in its interpreter: tests/ops/test_triton_*.py, at sizes for that
                continue
            assert failures(check, backend, case, right) == [], backend


def test_every_op_has_a_comparison_and_every_comparison_can_fail() -> None:
    (check,) = checks_of(affine_of_rows)
    case = next(case for case in cases(CPU, small=True) if len(case.x) == 65 and case.valid is None)
    right = truth(check, case)
    wrong = Case(case.name, case.x + 1e-3, case.dy, case.valid, case.vectors)
    assert failures(check, "reference", wrong, right) != []
    calls = iter(range(10))
    noisy: Check = lambda case: {"y": (case.x + next(calls), 1.0, True)}  # noqa: E731
    assert "not the same bits twice" in failures(noisy, "reference", case, {"y": (case.x, 1.0, True)})[0]
    with pytest.raises(NotImplementedError, match=r"selftest/rows\.py has no comparison under @forgotten\.check"):
        checks_of(Op(forgotten, "rows", None, (), None))


def forgotten(rows: Tensor) -> Tensor:
    """An op without a comparison, as if it stood among the ops of `rows`."""
    return rows


forgotten.__module__ = "stabnorm.ops.rows"


def test_an_op_and_a_backend_that_are_added_are_tested_without_another_list(monkeypatch: pytest.MonkeyPatch) -> None:
    added = Op(forgotten, "rows", None, (), None)
    monkeypatch.setitem(dispatch.OPS, "forgotten", added)
    added.backend("aten")(lambda rows: rows + 1)
    added.check(lambda case: {"y": (added(case.x), 1.0, True)})
    monkeypatch.setattr("stabnorm.ops.selftest.cases", lambda *_, **__: list(cases(CPU, small=True))[:1])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wrong = {(op.name, backend): lines for op, backend, lines in compare(CPU)}
    assert wrong.pop(("forgotten", "aten")) != []
    assert not any(wrong.values())


@pytest.mark.slow
def test_the_selftest_prints_a_line_for_each_and_records_what_passed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library.why_not()  # loaded now, for otherwise it would be built once more in the empty cache
    monkeypatch.setenv("STABNORM_CACHE", str(tmp_path))
    tested.read_again()
    monkeypatch.setattr("stabnorm.ops.selftest.cases", lambda *_, **__: list(cases(CPU, small=True))[:3])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # kernels would run on a CPU
    assert main(["--device", "cpu"]) == 0
    *printed, recorded = capsys.readouterr().out.splitlines()
    assert recorded == f"cpu: recorded in {tmp_path / 'tested_devices.json'}"
    assert len(printed) == sum(len(backends_of(op, CPU)) for op in all_ops())
    assert all(line.endswith("passed") for line in printed)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "RepBN": lambda: RepBN(48),
    "RepBN, not centred": lambda: RepBN(48, center=False),
    "UnifiedNorm": lambda: UnifiedNorm(48, warmup_steps=0),
    "PowerNorm": lambda: PowerNorm(48, warmup_steps=0),
    "PowerNorm, groups": lambda: PowerNorm(48, groups=3, warmup_steps=0),
    "PRepBN": lambda: PRepBN(48),
    "PRepBN, rms": lambda: PRepBN(48, kind="rms"),
}


def trained(name: str, dtype: torch.dtype, masked: bool) -> dict[str, Tensor]:
    """Outputs, gradients and statistics of three steps."""
    generator = torch.Generator().manual_seed(1)
    module = MODULES[name]().to(dtype)
    if "lam" in dict(module.named_buffers()):
        module.get_buffer("lam").fill_(0.4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) / 4)
    results: dict[str, Tensor] = {}
    scale, offset = torch.rand(2, 48, generator=generator) + 0.5
    for step in range(3):
        # The same numbers in every dtype, so that only the computing differs.
        x = (torch.randn(7, 31, 48, generator=generator) * scale + offset).bfloat16().to(dtype).requires_grad_()
        dy = torch.randn(7, 31, 48, generator=generator).bfloat16().to(dtype)
        mask = torch.rand(7, 31, generator=generator) < 0.8 if masked else None
        y = module(x, mask)
        y.backward(dy if mask is None else dy * mask[..., None])
        assert x.grad is not None
        results[f"y {step}"], results[f"dx {step}"] = y.detach(), x.grad
    results |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return results | {name: b for name, b in module.named_buffers() if name.startswith("running")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", list(MODULES))
def test_every_backend_of_a_module_equals_float64_forward_and_backward(
    name: str, masked: bool, dtype: torch.dtype
) -> None:
    with use_kernels("reference"):
        right = trained(name, torch.float64, masked)
    # The parameters are the dtype's own, and PRepBN and GroupScaling round what lies between.
    tolerance = 6 * TOLERANCES[dtype][1]
    for setting in ("reference", "aten", "cpp"):
        with use_kernels(setting):
            once, again = trained(name, dtype, masked), trained(name, dtype, masked)
        for part, want in right.items():
            assert torch.equal(once[part], again[part]), f"{setting}, {part}: not the same bits twice"
            error, natural = (once[part].double() - want).abs().amax(), want.abs().amax()
            assert error <= tolerance * natural, f"{setting}, {part}: {error / natural:.2g}"
