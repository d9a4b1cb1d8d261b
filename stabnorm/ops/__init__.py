"""Fused reductions.

Each file here has formulas as ops (`dispatch.op`). The files of the same name in `aten/`, `cpp/` and `triton/` have
their faster backends. `dispatch.py` chooses the backend that runs.
"""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.ops.dispatch import backends as backends
    from stabnorm.ops.dispatch import use_kernels as use_kernels

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"stabnorm.ops.dispatch": ["backends", "use_kernels"]})
