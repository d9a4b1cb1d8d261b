"""Torch's own norms, known by type."""

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from stabnorm._models.watched import own_class
from stabnorm.functional import Kind
from stabnorm.norms.layer import NormLayer, eps_of

_SPATIAL_DIMS = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}


_FORWARDS = (
    nn.LayerNorm.forward, nn.RMSNorm.forward, _BatchNorm.forward, nn.SyncBatchNorm.forward, nn.GroupNorm.forward,
    _InstanceNorm.forward,
)  # fmt: skip


def torch_own(name: str, module: nn.Module) -> NormLayer | None:
    """Describe one of torch's norms, or of a subclass that keeps torch's `forward`; None for any other module.

    A subclass that overrides `forward` may compute anything.
    """
    forward = getattr(own_class(module), "forward", None)  # a scripted module's class has none
    return of_torch_class(name, module) if forward in _FORWARDS else None


def of_torch_class(name: str, module: nn.Module) -> NormLayer | None:
    """Describe the norm of torch's that a module is, or derives from, whatever its `forward` is; None for others."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        kind: Kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"
        shape = module.normalized_shape
        eps = eps_of(module.eps, module.weight)
        return NormLayer(name, module, kind, -1, math.prod(shape), eps, feature_dims=len(shape))
    if isinstance(module, _BatchNorm):
        return NormLayer(name, module, "batch", 1, module.num_features, module.eps)
    if isinstance(module, nn.GroupNorm):
        return NormLayer(name, module, "group", 1, module.num_channels, module.eps, groups=module.num_groups)
    if isinstance(module, _InstanceNorm):
        channel_dim, num_features = channels_of_torch_class(module), module.num_features
        if channel_dim is not None:
            return NormLayer(name, module, "instance", channel_dim, num_features, module.eps, groups=num_features)
    return None


def channels_of_torch_class(module: nn.Module) -> int | None:
    """Give the axis of the channels that a class of torch's, or one that derives from it, reads; None for another."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return -1
    if isinstance(module, _BatchNorm | nn.GroupNorm):
        return 1
    return next((-1 - dims for cls, dims in _SPATIAL_DIMS.items() if isinstance(module, cls)), None)
