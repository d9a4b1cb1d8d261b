"""Norms of every kind and layout, and in float64 what they see and make of it: shared by the tests of statistics."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stabnorm import find_norms

Array = npt.NDArray[np.float64]


class LayerNorm2d(nn.LayerNorm):
    """Like timm's: channels first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
CASES: dict[str, Case] = {
    "layer-NLC": (lambda: nn.LayerNorm(37), (6, 45, 37)),
    "layer-NC": (lambda: nn.LayerNorm(20, eps=1e-3), (257, 20)),
    "layer-NCHW": (lambda: LayerNorm2d(12), (3, 12, 7, 9)),
    "layer-two-dims": (lambda: nn.LayerNorm((4, 6)), (130, 4, 6)),
    "layer-no-affine": (lambda: nn.LayerNorm(16, elementwise_affine=False), (9, 31, 16)),
    "layer-no-bias": (lambda: nn.LayerNorm(16, bias=False), (9, 31, 16)),
    "rms-NLC": (lambda: nn.RMSNorm(37, eps=1e-6), (6, 45, 37)),
    "batch-NC": (lambda: nn.BatchNorm1d(19), (150, 19)),
    "batch-NCL": (lambda: nn.BatchNorm1d(19), (10, 19, 21)),
    "batch-NCHW": (lambda: nn.BatchNorm2d(10), (4, 10, 6, 7)),
    "batch-no-affine": (lambda: nn.BatchNorm2d(10, affine=False), (4, 10, 6, 7)),
    "batch-no-buffers": (lambda: nn.BatchNorm2d(10, track_running_stats=False), (4, 10, 6, 7)),
    "group-NCHW": (lambda: nn.GroupNorm(3, 12), (5, 12, 6, 7)),
    "group-NCL": (lambda: nn.GroupNorm(4, 12), (5, 12, 33)),
    "instance-NCHW": (lambda: nn.InstanceNorm2d(6, affine=True), (5, 6, 8, 9)),
    "instance-unbatched": (lambda: nn.InstanceNorm1d(6), (6, 200)),
}


def normalised(module: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the norm makes of float64 x before gain and bias, in x's layout, and the variances it divides by."""
    (norm,) = find_norms(nn.Sequential(module))
    if norm.kind == "batch":
        return None, None
    if norm.kind in ("layer", "rms"):
        dims = tuple(range(x.ndim - norm.feature_dims, x.ndim)) if norm.feature_dims > 1 else norm.channel_dim
        mean = x.mean(dims, keepdim=True) if norm.kind == "layer" else torch.zeros((), dtype=x.dtype)
        var = (x - mean).square().mean(dims, keepdim=True)
        return (x - mean) / (var + norm.eps).sqrt(), var
    batched = x[None] if x.ndim == -norm.channel_dim else x
    grouped = batched.reshape(batched.shape[0], norm.groups, -1)
    var = grouped.var(-1, unbiased=False, keepdim=True)
    n = ((grouped - grouped.mean(-1, keepdim=True)) / (var + norm.eps).sqrt()).reshape(x.shape)
    return n, var


def rows(t: Tensor, module: nn.Module) -> Array:
    (norm,) = find_norms(nn.Sequential(module))
    if norm.feature_dims > 1:
        t = t.flatten(-norm.feature_dims)
    return t.movedim(norm.channel_dim, -1).reshape(-1, norm.num_features).double().numpy()
