"""What any norm layer is: its kind, channel axis, eps, gain and statistics; and how a model's norms are found."""

from stabnorm.functional import Kind as Kind
from stabnorm.norms.layer import NormLayer as NormLayer
from stabnorm.norms.registry import is_registered as is_registered
from stabnorm.norms.registry import register_norm as register_norm
from stabnorm.norms.search import NormSearch as NormSearch
from stabnorm.norms.search import find_norms as find_norms

__all__ = ["Kind", "NormLayer", "NormSearch", "find_norms", "is_registered", "register_norm"]
