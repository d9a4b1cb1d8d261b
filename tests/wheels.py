"""Builds a wheel of this checkout, for tests of what is in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build_wheel(folder: Path, **variables: str) -> Path:
    """Build the wheel under these environment variables, from a copy, because building leaves folders behind."""
    pytest.importorskip("setuptools", "77")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "shared")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "wheel", str(folder / "source"), "--no-deps", "--no-build-isolation"]
    target = folder / "wheel"
    built = subprocess.run([*pip, "-w", str(target)], capture_output=True, text=True, env=os.environ | variables)
    if "No module named pip" in built.stderr:
        pytest.skip("there is no pip to build the wheel with")
    assert built.returncode == 0, built.stderr
    (path,) = target.glob("*.whl")
    return path
