"""`LayerHook`: what all hooks on the norms of a model share, above all the checks of a tensor before it is read."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._models.calls import mask_of
from stabnorm._models.hooks import Hook
from stabnorm._models.ranks import is_distributed
from stabnorm.monitor.accumulators import Accumulators
from stabnorm.norms import NormLayer
from stabnorm.norms.rows import tokens_of


class LayerHook(Hook):
    """A hook of one layer.

    Args:
        into: the accumulators that it adds to.
        index: number of the layer's row.
    """

    def __init__(self, into: Accumulators, index: int) -> None:
        self.into, self.layer, self.index = into, into.layers[index], index

    def counts(self, module: nn.Module) -> bool:
        """Whether a forward of the layer counts now. A module in eval mode, such as a teacher, does not train."""
        into = self.into
        return not into.paused and (into.in_eval or (into.model.training and module.training))

    def understands(self, x: Any) -> bool:
        """Whether an input or output of the layer can be counted; if not, say once why."""
        reason = why_not(self.layer, x)
        if reason is not None and not torch.compiler.is_compiling():
            self.into.refuse(self.index, reason)
        return reason is None

    def valid(self, module: nn.Module, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Say which tokens of an input or output are valid: by the call's own mask, or else by the active one."""
        return valid_of(self.layer, module, x, args, kwargs)


def valid_of(
    layer: NormLayer, module: nn.Module, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Return which tokens of a norm's input or output are valid, in the shape of the tokens; None if all are."""
    mask = mask_of(args, kwargs)
    if mask is None or not hasattr(module, "fold_affine"):  # another norm's mask may mean something else
        return layer.valid(x)
    tokens = tokens_of(x.shape, layer.channel_dim, layer.feature_dims)
    fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == tokens
    return mask if fits else None  # the norm itself refuses another one


def why_not(layer: NormLayer, x: Any) -> str | None:
    """Return why an input or output of a norm cannot be counted. This is no error: the norm itself may accept it."""
    if not isinstance(x, Tensor) or x.is_nested or not x.is_floating_point():
        return f"its input is {'a nested or integer tensor' if isinstance(x, Tensor) else type(x).__name__}"
    if x.device.type == "meta":
        return "its input is on the meta device"
    if is_distributed(x):
        return "its input is a DTensor, of which every process has a part or a copy"
    if x.ndim < max(layer.feature_dims, -layer.channel_dim, layer.channel_dim + 1):
        return f"its input has {x.ndim} axes"
    channels = x.shape[x.ndim - layer.feature_dims :].numel() if layer.feature_dims > 1 else x.shape[layer.channel_dim]
    if channels != layer.num_features:
        expected = "the model around it lets expect" if layer.any_width else "it was built for"
        return f"its input has {channels} channels and {expected} {layer.num_features}"
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return "it runs inside a torch.func transform"
    return None
