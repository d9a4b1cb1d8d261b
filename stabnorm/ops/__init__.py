"""Fused reductions.

A file here holds formulas as ops (`dispatch.op`), and the file of the same name in `aten/`, `cpp/` or `triton/` their
faster backends. `dispatch.py` chooses which one runs.
"""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.ops.dispatch import backends as backends
    from stabnorm.ops.dispatch import use_kernels as use_kernels

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"stabnorm.ops.dispatch": ["backends", "use_kernels"]})
