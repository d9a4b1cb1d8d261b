"""The C++ backend of `stabnorm.monitor.standard`, see `standard.cpp`."""

import torch
from torch import Tensor

from stabnorm.ops.cpp.library import call
from stabnorm.ops.standard import Layers


def standard(
    seen: Tensor,
    channel: Tensor,
    token: Tensor,
    gradient: Tensor,
    between: Tensor | None,
    layers: Layers,
    own: Tensor | None,
    past: Tensor,
    past_layer: Tensor,
    row: Tensor,
) -> None:
    """Fill ``row [L, columns]``, and add the step to ``past [L, rows, C]`` and ``past_layer [L, rows]``.

    Args:
        seen: number of tokens, ``[L]`` int64.
        channel: raw moments ``[L, rows, C]``.
        token: ``[L, rows]``.
        gradient: ``[L, 2, C]``.
        between: ``[L, C]`` float64, or None.
        layers: what the layers are.
        own: ``[L, 2, C]`` float64, the layers' own running means and variances, or None.
        past: float64.
        past_layer: float64.
        row: float32.
    """
    between = None if between is None else between.contiguous()
    call(
        "standard", seen.contiguous(), channel.contiguous(), token.contiguous(), gradient.contiguous(), between,
        *layers, own, len(row), channel.shape[-1], torch.get_num_threads(), past, past_layer, row,
    )  # fmt: skip
