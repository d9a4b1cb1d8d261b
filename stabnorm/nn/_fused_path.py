"""Keep torch's encoder layers off their fused path for eval mode if they hold a norm of ours, or what took its place.

The fused path computes a layer norm with the norms' weights. It neither calls the norms nor checks their type. With one
of our norms, or with what stands in a folded norm's place, eval would silently compute something else than was trained;
with torch's RMSNorm, which has no bias, it would raise an error.
"""

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from stabnorm.nn._base import LeavesFusedPath


def leave_fused_paths(model: nn.Module) -> None:
    """Keep every encoder layer that holds one of them off the fused path, and its encoder, too."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _holds_ours(module):
            _leave(module)
        if isinstance(module, nn.TransformerEncoder) and _holds_ours(module.layers):
            module.enable_nested_tensor = module.use_nested_tensor = False


def _holds_ours(module: nn.Module) -> bool:
    return any(isinstance(part, LeavesFusedPath | nn.RMSNorm) for part in module.modules())


def _leave(layer: nn.TransformerEncoderLayer) -> None:
    """Keep this layer, its copies and its pickles off the fused path."""
    layer.activation_relu_or_gelu = 0  # the code for an activation that the fused path does not support


def _on_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Handle ``layer.norm1 = RepBN(d)`` in a user's code; `convert_norms` calls `leave_fused_paths` itself."""
    if isinstance(module, nn.TransformerEncoderLayer) and isinstance(child, LeavesFusedPath):
        _leave(module)


# This hook runs when a layer gets its norm. A hook on the norm would work, too, but would cost time in every forward.
register_module_module_registration_hook(_on_registration)
