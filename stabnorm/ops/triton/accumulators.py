"""The Triton backend of `accumulators`, see `stabnorm.ops.triton.accumulating`."""

import torch
import triton
from torch import Tensor

from stabnorm.functional import RawMoments
from stabnorm.ops.accumulators import merge_splits
from stabnorm.ops.triton.accumulating import merge_layers
from stabnorm.ops.triton.shared import split_tile


@merge_splits.backend("triton")
def merge(seen: Tensor, channel: Tensor, token: Tensor) -> RawMoments:
    """See `ops.accumulators.merge_splits`; a layer that did not run gets 0."""
    layers, splits, channel_rows, channels = channel.shape
    out = RawMoments(
        seen.new_empty(layers),
        channel.new_empty(layers, channel_rows, channels),
        token.new_empty(layers, token.shape[2]),
    )
    tile = split_tile(splits)
    with torch.cuda.device_of(channel):  # a kernel runs on the current device, whatever the device of its arguments
        grid = triton.cdiv(channels, tile["CHANNELS"]), layers
        merge_layers[grid](seen, channel, token, *out, splits, channels, **tile)
    return out
