"""Torch's encoder layers and their fused path for eval, which runs a layer norm on the norms' weights.

It never calls the norms nor asks what they are, so a layer that holds one of ours must be kept off it: eval would
compute something else than was trained, without a word.
"""

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from stabnorm.nn._channel_norm import ChannelNorm
from stabnorm.nn.prep import PRepBN


def leave_fused_path(layer: nn.TransformerEncoderLayer) -> None:
    """Keep this layer, its copies and pickles from the fused path."""
    layer.activation_relu_or_gelu = 0  # "none that the fused path knows"


def _on_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """``layer.norm1 = RepBN(d)``, by hand; `convert_norms` sees to its own."""
    if isinstance(module, nn.TransformerEncoderLayer) and isinstance(child, ChannelNorm | PRepBN):
        leave_fused_path(module)


# The one place where a layer gets to know its norm. A hook on the norm would do, but would cost each of its forwards.
register_module_module_registration_hook(_on_registration)
