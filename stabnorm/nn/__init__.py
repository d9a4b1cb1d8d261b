"""Norm modules that are affine in eval (UnifiedNorm, RepBN, PRepBN, TaperNorm, PowerNorm), and baselines."""

from stabnorm._lazy import public_names
from stabnorm.nn import _fused_path, _official_variants  # noqa: F401  # a hook on torch's encoder layers; variants
from stabnorm.nn.batch_channel import BatchChannelNorm, EstBatchNorm
from stabnorm.nn.elementwise import Derf, DyT, SRMSNorm
from stabnorm.nn.evo import EvoNormB0, EvoNormS0
from stabnorm.nn.groups import no_decay_groups
from stabnorm.nn.linear_attention import SimplifiedLinearAttention
from stabnorm.nn.power import PowerNorm
from stabnorm.nn.prep import PRepBN
from stabnorm.nn.rep import RepBN
from stabnorm.nn.taper import TaperNorm
from stabnorm.nn.unified import UnifiedNorm
from stabnorm.nn.unmix import UnMixTNS

__all__ = [
    "BatchChannelNorm",
    "Derf",
    "DyT",
    "EstBatchNorm",
    "EvoNormB0",
    "EvoNormS0",
    "PRepBN",
    "PowerNorm",
    "RepBN",
    "SRMSNorm",
    "SimplifiedLinearAttention",
    "TaperNorm",
    "UnMixTNS",
    "UnifiedNorm",
    "no_decay_groups",
]
__dir__ = public_names(__name__, __all__)
