"""Norm modules that are affine in eval: Unified Normalization, RepBN, PRepBN and PowerNorm."""

from stabnorm.nn import _fused_path  # noqa: F401  # keeps torch's encoder layers from passing our norms over
from stabnorm.nn.groups import no_decay_groups
from stabnorm.nn.power import PowerNorm
from stabnorm.nn.prep import PRepBN
from stabnorm.nn.rep import RepBN
from stabnorm.nn.unified import UnifiedNorm

__all__ = ["PRepBN", "PowerNorm", "RepBN", "UnifiedNorm", "no_decay_groups"]
