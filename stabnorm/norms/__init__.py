"""What any norm layer is: its kind, channel axis, eps, gain and statistics; and how a model's norms are found."""

from typing import TYPE_CHECKING

from stabnorm._lazy import lazy_exports

if TYPE_CHECKING:
    from stabnorm.functional import Kind as Kind
    from stabnorm.norms.layer import NormLayer as NormLayer
    from stabnorm.norms.registry import is_registered as is_registered
    from stabnorm.norms.registry import register_norm as register_norm
    from stabnorm.norms.search import NormSearch as NormSearch
    from stabnorm.norms.search import find_norms as find_norms

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "stabnorm.functional": ["Kind"],
        "stabnorm.norms.layer": ["NormLayer"],
        "stabnorm.norms.registry": ["is_registered", "register_norm"],
        "stabnorm.norms.search": ["NormSearch", "find_norms"],
    },
)
