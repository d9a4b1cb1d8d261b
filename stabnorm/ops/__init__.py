"""Fused reductions. One name, one op: `<op>.py` checks, `dispatch.py` chooses the execution; bodies lie beside them."""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.ops.dispatch import backends as backends
    from stabnorm.ops.dispatch import use_kernels as use_kernels

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"stabnorm.ops.dispatch": ["backends", "use_kernels"]})
