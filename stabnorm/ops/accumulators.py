"""The accumulators that `accumulate_moments_` fills, plain or in splits, and the op that merges the splits.

An accumulator in splits has a part for each program of a kernel that adds to it, so that no program waits for another.
"""

import torch
from torch import Tensor

from stabnorm import functional
from stabnorm.functional import RawMoments, empty_moments
from stabnorm.ops.dispatch import op
from stabnorm.ops.moments import add_moments_


def empty_accumulators(layers: int, channels: int, device: torch.device, splits: int = 0) -> RawMoments:
    """Create accumulators of layers: ``seen [L]``, or ``[L, S]`` if a kernel fills splits.

    `merge_accumulators` later merges the splits of all layers in one launch.

    Args:
        layers: number of layers.
        channels: number of channels of the widest layer.
        device: device of the accumulators.
        splits: number of splits that another kernel needs. Default: 0, there is no other kernel.

    >>> empty_accumulators(2, 3, torch.device("cpu")).seen.shape
    torch.Size([2])
    """
    if add_moments_.chosen(torch.empty(1, device=device)) != "triton":
        return empty_moments(layers, channels, device)
    from stabnorm.ops.triton.shared import columns

    splits = splits or columns(channels, device).splits
    return RawMoments(*(p.unflatten(0, (layers, splits)) for p in empty_moments(layers * splits, channels, device)))


def merge_accumulators(accumulators: RawMoments) -> RawMoments:
    """Return one accumulator for each layer, ``seen [L]``; accumulators without splits are returned as they are."""
    return accumulators if accumulators.seen.ndim == 1 else merge_splits(*accumulators)


@op("channel")
def merge_splits(seen: Tensor, channel: Tensor, token: Tensor) -> RawMoments:
    """`functional.merge_splits` of ``seen [L, S]``, ``channel [L, S, rows, C]`` and ``token [L, S, rows]``."""
    return functional.merge_splits(RawMoments(seen, channel, token))
