"""A wheel that carries the C++ library needs no compiler where it is installed, and its tag says where it can be."""

import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from stabnorm.ops import admission, tested
from stabnorm.ops.cpp import build, library
from tests.wheels import ROOT, build_wheel

USED = """
import shutil, sys
import torch
from stabnorm.nn import RepBN
from stabnorm.ops import admission, backends, selftest, tested
from stabnorm.ops.cpp import build, library
from stabnorm.ops.rows import moments_of_rows
from stabnorm.ops.selftest import cases, compare
from stabnorm.ops.selftest.__main__ import main

assert not build.has_compiler() and not shutil.which("c++")
cpu, x, features = torch.device("cpu"), torch.randn(4, 8), tested.features_of_cpu()
few = list(cases(cpu, small=True))[:2]
selftest.cases = lambda *_, **__: few
for level in build.levels():
    if level.needs <= set(features.split()):
        tested.features_of_cpu = lambda: " ".join(level.needs)  # an older CPU
        library._load.cache_clear()
        assert not [op.name for op, _, wrong in compare(cpu, only="cpp") if wrong]
        print(library.path().relative_to(sys.prefix))
tested.features_of_cpu = lambda: features
library._load.cache_clear()
assert moments_of_rows.chosen(x) == "aten"  # it is admitted by its self-test only, which runs by itself
admission.wait(cpu, 0.0)
print("tested by itself:", admission._running[cpu] is not None)
admission._running[cpu].kill()
admission._running[cpu].wait()
assert main(["--device", "cpu"]) == 0
assert moments_of_rows.chosen(x) == "cpp"
RepBN(8)(x)
print({line.runs for line in backends(["cpu"]) if "cpp" in line.runs or "cpp" in line.why})
"""


@pytest.mark.slow
def test_installed_where_there_is_no_compiler_it_runs_cpp_on_every_level_of_instructions(tmp_path: Path) -> None:
    if not build.levels() or not build.has_compiler() or not shutil.which("objdump"):
        pytest.skip("building needs Linux, a C++ compiler and objdump")
    wheel = build_wheel(tmp_path, STABNORM_WHEEL="library", CXXFLAGS="-O0")  # -O3 takes ten seconds a level
    name, _, python, abi, tag = wheel.stem.split("-")
    assert (name, python, abi) == ("stabnorm", "py3", "none")
    assert tag.startswith("manylinux_2_")
    assert tag.endswith(platform.machine())

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python_there = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python_there), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    paths = {"base": str(environment), "platbase": str(environment)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (site / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")  # torch, and all but stabnorm
    variables = {"PATH": str(environment / "bin"), "HOME": str(tmp_path), "STABNORM_CACHE": str(tmp_path / "cache")}
    command = [str(python_there), "-W", "ignore", "-c", USED]
    ran = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    own = [level for level in build.levels() if level.needs <= set(tested.features_of_cpu().split())]
    package = site.relative_to(environment) / "stabnorm"
    files = [str(package / level.file.relative_to(ROOT / "stabnorm")) for level in own]
    assert [line for line in ran.stdout.splitlines() if line.endswith(".so")] == files
    assert "tested by itself: True" in ran.stdout
    assert "{'cpp'}" in ran.stdout


@pytest.fixture
def in_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[build.Level]:
    """The levels of an x86-64 machine, whose libraries are there."""
    monkeypatch.setattr(build, "IN_WHEEL", tmp_path)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    for level in build.levels():
        level.file.touch()
    return list(build.levels())


def test_a_cpu_gets_the_fastest_library_whose_instructions_it_has(
    in_wheel: list[build.Level], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, level in enumerate(in_wheel):
        monkeypatch.setattr(tested, "features_of_cpu", lambda level=level: " ".join({*level.needs, "fpu"}))
        assert library._in_wheel() == level.file
        lacks = sorted(level.needs - (in_wheel[number + 1].needs if number + 1 < len(in_wheel) else set()))[0]
        monkeypatch.setattr(tested, "features_of_cpu", lambda level=level, no=lacks: " ".join(level.needs - {no}))
        assert library._in_wheel() == (in_wheel[number + 1].file if number + 1 < len(in_wheel) else None)


def test_without_a_library_and_a_compiler_one_line_says_that_aten_runs(
    in_wheel: list[build.Level], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    monkeypatch.setenv("STABNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "has_compiler", lambda: False)
    monkeypatch.setattr(tested, "features_of_cpu", lambda: "fpu")
    monkeypatch.setattr(admission, "_running", {})
    tested.fingerprint.cache_clear()
    tested.read_again()
    with caplog.at_level("INFO", logger="stabnorm"):
        admission.start(torch.device("cpu"))
        admission.start(torch.device("cpu"))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["ATen runs on the CPU"]
    tested.fingerprint.cache_clear()


@pytest.mark.parametrize(
    ("headers", "tag"),
    [
        ("  NEEDED  libc.so.6\nVersion References:\n  0x09 0x00 04 GLIBC_2.2.5\n  0x06 0x00 02 GLIBC_2.14", "2_17"),
        ("  NEEDED  libm.so.6\nVersion References:\n  0x06 0x00 02 GLIBC_2.29\n", "2_29"),
        ("  NEEDED  libgomp.so.1\nVersion References:\n", "libgomp.so.1"),
        ("  NEEDED  libstdc++.so.6\nVersion References:\n  0x02 0x00 05 GLIBCXX_3.4.29\n", "GLIBCXX_3.4.29"),
    ],
)
def test_the_tag_names_the_glibc_that_the_symbols_need_and_other_needs_are_refused(
    headers: str, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("setuptools", "77")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delenv("STABNORM_WHEEL", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    platform_tag: Any = runpy.run_path(str(ROOT / "setup.py"))["platform_tag"]
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, headers, ""))
    if tag.startswith("2_"):
        assert platform_tag([Path("one.so")]) == f"manylinux_{tag}_{platform.machine()}"
    else:
        with pytest.raises(SystemExit, match=tag.replace("+", r"\+")):
            platform_tag([Path("one.so")])
