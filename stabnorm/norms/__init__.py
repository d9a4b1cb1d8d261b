"""What any norm layer is: its kind, channel axis, eps, gain and statistics; and how a model's norms are found."""

from stabnorm.norms.search import Kind as Kind
from stabnorm.norms.search import NormLayer as NormLayer
from stabnorm.norms.search import NormSearch as NormSearch
from stabnorm.norms.search import find_norms as find_norms
from stabnorm.norms.search import is_registered as is_registered
from stabnorm.norms.search import register_norm as register_norm

__all__ = ["Kind", "NormLayer", "NormSearch", "find_norms", "is_registered", "register_norm"]
