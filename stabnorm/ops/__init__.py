"""Fused reductions.

A file here holds formulas as ops (`dispatch.op`), and the file of the same name in `aten/`, `cpp/` or `triton/` their
faster backends. `dispatch.py` chooses which one runs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabnorm.ops.dispatch import backends as backends
    from stabnorm.ops.dispatch import use_kernels as use_kernels


def __getattr__(name: str) -> Any:
    if name in ("backends", "use_kernels"):  # later, for they load torch
        return getattr(importlib.import_module("stabnorm.ops.dispatch"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
