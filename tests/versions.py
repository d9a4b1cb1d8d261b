"""What a machine or the oldest promised versions of torch and Lightning lack, as reasons to skip a test."""

import importlib.util
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def _why_no_inductor() -> str:
    """Why Inductor cannot build its C++ code here; "" where it can."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "Inductor needs a C++ compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Inductor needs the headers of Python (python3-dev on Debian)"
    if any(" " in path for path in (torch.__file__, os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir()))):
        return "Inductor does not quote a path with a blank in the call of its linker"
    return ""


needs_inductor = pytest.mark.skipif(bool(_why_no_inductor()), reason=_why_no_inductor())
needs_fsdp_on_cpu = pytest.mark.skipif(TORCH < (2, 7), reason="FSDP2 of torch before 2.7 does not run on a CPU")
needs_quantiles_on_the_device = pytest.mark.skipif(
    TORCH < (2, 7), reason="nanquantile of torch before 2.7 reads a value from the device"
)
needs_stable_hook_guards = pytest.mark.skipif(
    TORCH < (2, 7), reason="Dynamo before torch 2.7 recompiles whenever the same hooks are registered again"
)
needs_triton_without_driver = pytest.mark.skipif(
    TORCH < (2, 7), reason="Triton of torch before 2.7 needs a GPU to trace a kernel"
)
needs_weight_averaging = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_lightning.callbacks.weight_averaging") is None,
    reason="Lightning before 2.6 has no WeightAveraging",
)
