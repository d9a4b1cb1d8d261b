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
    """Accumulators of layers: ``seen [L]``, or ``[L, S]`` where a kernel fills splits.

    Splits of a layer stay apart until `merge_accumulators` merges those of all layers in one launch.

    Args:
        layers: L.
        channels: of the widest.
        device: where.
        splits: how many another kernel fills; 0: there is no other.

    >>> empty_accumulators(2, 3, torch.device("cpu")).seen.shape
    torch.Size([2])
    """
    if add_moments_.chosen(torch.empty(1, device=device)) != "triton":
        return empty_moments(layers, channels, device)
    from stabnorm.ops.triton.shared import columns

    splits = splits or columns(channels, device).splits
    return RawMoments(*(p.unflatten(0, (layers, splits)) for p in empty_moments(layers * splits, channels, device)))


def merge_accumulators(accumulators: RawMoments) -> RawMoments:
    """One accumulator for each layer, ``seen [L]``; the same where there are no splits."""
    return accumulators if accumulators.seen.ndim == 1 else merge_splits(*accumulators)


@op("channel")
def merge_splits(seen: Tensor, channel: Tensor, token: Tensor) -> RawMoments:
    """`functional.merge_splits` of ``seen [L, S]``, ``channel [L, S, rows, C]`` and ``token [L, S, rows]``."""
    return functional.merge_splits(RawMoments(seen, channel, token))
