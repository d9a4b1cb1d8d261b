"""Every kernel compiles to machine code for a GPU that need not be there, and every op can be traced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton_kernels import MARKS
from tests.versions import needs_triton_without_driver

pytestmark = [MARKS[0], needs_triton_without_driver, pytest.mark.slow]


def test_kernels_compile_for_a_gpu_and_use_no_local_memory(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    script = [sys.executable, "-m", "tests.ops.triton_builds"]
    ran = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stderr
    traced, *kernels = ran.stdout.splitlines()
    assert traced == "traced 15 ops"
    names = {line.split()[0] for line in kernels}
    assert len(names) == 26, names
    assert all(line.endswith("local 0") for line in kernels), kernels
