"""Torch's encoder layers and their fused path for eval, which runs a layer norm on the norms' weights.

It never calls the norms nor asks what they are, so a layer that holds one of ours must be kept off it: eval would
compute something else than was trained, and nothing would say so.
"""

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from stabnorm.nn._base import EvalAffineNorm


def leave_fused_paths(model: nn.Module) -> None:
    """Keep every encoder layer of a model that holds a norm of ours from the fused path, and its encoder, too."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _holds_ours(module):
            _leave(module)
        if isinstance(module, nn.TransformerEncoder) and _holds_ours(module.layers):
            module.enable_nested_tensor = module.use_nested_tensor = False


def _holds_ours(module: nn.Module) -> bool:
    return any(isinstance(part, EvalAffineNorm) for part in module.modules())


def _leave(layer: nn.TransformerEncoderLayer) -> None:
    """Keep this layer, its copies and pickles from the fused path."""
    layer.activation_relu_or_gelu = 0  # "none that the fused path knows"


def _on_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """``layer.norm1 = RepBN(d)``, by hand; `convert_norms` sees to its own."""
    if isinstance(module, nn.TransformerEncoderLayer) and isinstance(child, EvalAffineNorm):
        _leave(module)


# The one place where a layer gets to know its norm. A hook on the norm would do, but would cost each of its forwards.
register_module_module_registration_hook(_on_registration)
