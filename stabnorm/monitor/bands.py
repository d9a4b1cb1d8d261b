"""Bands: layers of like width, which are measured together in tensors ``[L, C]``, padded to the widest of the band.

One band for all layers would make memory, checkpoints and time follow the widest layer: a LayerNorm over 65 536 numbers
among forty of 64 would cost forty times its own size. A band for each width would run the catalogue once for every
width. `bands_of` weighs one against the other, and a model of one width has one band.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabnorm.norms import NormLayer

BAND_COSTS = 4096  # a run of the catalogue takes as long as it takes for this many channels more


@dataclass(frozen=True, eq=False)
class Band:
    """Layers of like width.

    Attributes:
        layers: the norms.
        rows: their numbers among all layers, ascending.
        width: the widest one's channels.
    """

    layers: tuple[NormLayer, ...]
    rows: tuple[int, ...]
    width: int


def bands_of(layers: Sequence[NormLayer]) -> tuple[Band, ...]:
    """Sort layers into the bands that cost least, narrow ones first."""
    widths = [layer.num_features for layer in layers]
    bands = []
    for narrowest, widest in cheapest_bands(widths):
        rows = tuple(row for row, width in enumerate(widths) if narrowest <= width <= widest)
        bands.append(Band(tuple(layers[row] for row in rows), rows, widest))
    return tuple(bands)


def cheapest_bands(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the least and the largest width of each band, so that padded channels and bands cost least together.

    >>> cheapest_bands([64, 128, 64])
    [(64, 128)]
    >>> cheapest_bands([64] * 40 + [65536])
    [(64, 64), (65536, 65536)]
    """
    distinct = sorted(set(widths))
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]  # cost and bands of the narrowest widths, none at first
    for end, widest in enumerate(distinct):
        options, layers = [], 0
        for start in range(end, -1, -1):
            layers += widths.count(distinct[start])
            cost, before = best[start]
            options.append((cost + BAND_COSTS + layers * widest, [*before, (distinct[start], widest)]))
        best.append(min(options))
    return best[-1][1]


class LayerOrder:
    """Puts what was computed band by band into the order of the layers.

    Args:
        bands: the bands, which together have every layer once.
    """

    def __init__(self, bands: Sequence[Band]) -> None:
        places = [row for band in bands for row in band.rows]
        self._order = torch.tensor(places, device="cpu").argsort()
        self._single = len(bands) == 1

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Join tensors ``[L, ...]``, one of each band."""
        if self._single:
            return parts[0]
        if self._order.device != parts[0].device:
            self._order = self._order.to(parts[0].device)
        return torch.cat([*parts]).index_select(0, self._order)
