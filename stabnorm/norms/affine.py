"""What a norm is in eval, where it is one affine map per channel."""

from typing import Any

import torch
from torch import Tensor, nn

from stabnorm.errors import StabNormError

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def affine_in_eval(module: nn.Module) -> tuple[Tensor, Tensor, int] | None:
    """``(scale, shift, channel_dim)`` of a norm that is one affine map per channel in eval; None for any other module.

    Torch's BatchNorms count by exact type: a subclass may end in an activation.

    Raises:
        StabNormError: it is such a norm, but not in this state.
        TypeError: its `fold_affine` returns anything else.
    """
    if callable(getattr(module, "fold_affine", None)):
        return _stated(module)
    if type(module) not in _BATCH_NORMS:
        return None
    mean, var, weight, bias = module.running_mean, module.running_var, module.weight, module.bias
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise StabNormError(f"{type(module).__name__} keeps no running statistics, so in eval it uses the batch's own")
    scale = torch.rsqrt(var.double() + float(module.eps))  # type: ignore[arg-type]
    if isinstance(weight, Tensor):
        scale = weight.detach().double() * scale
    shift = -scale * mean.double()
    return scale, bias.detach().double() + shift if isinstance(bias, Tensor) else shift, 1


def _stated(module: nn.Module) -> tuple[Tensor, Tensor, int]:
    try:
        affine: Any = module.fold_affine()  # type: ignore[operator]
    except NotImplementedError as error:
        raise StabNormError(f"the fold_affine() of {type(module).__name__} is not implemented") from error
    if not (isinstance(affine, tuple) and [type(part) for part in affine[2:]] == [int]):
        affine = (None, None, None)
    scale, shift, channel_dim = affine
    if not (isinstance(scale, Tensor) and isinstance(shift, Tensor) and scale.numel() == shift.numel()):
        raise TypeError(
            f"the fold_affine() of {type(module).__name__} does not return (scale, shift, channel_dim): two tensors of "
            "one number for each channel, and the axis of the channels"
        )
    return scale, shift, channel_dim
