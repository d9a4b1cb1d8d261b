"""The past of all layers in a checkpoint: a tensor for each thing remembered, with the channels of all layers in a row.

So its size follows the sum of the widths, and it does not depend on the bands that the layers were measured in.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stabnorm.monitor.measure import BandState


def saved_pasts(states: "Sequence[BandState]", channels: Sequence[int]) -> dict[str, Tensor]:
    """Return the pasts by name: ``[rows, sum of channels]`` per channel, ``[rows, L]`` per layer, in layer order.

    Args:
        states: the bands.
        channels: the number of channels of each layer.
    """
    pieces: dict[str, list[Tensor]] = {}
    for layer, (state, row) in enumerate(_rows(states)):
        for name, values in state.past.channel_rows().items():
            pieces.setdefault(name, []).append(values[row, :, : channels[layer]])
        for name, values in state.past.layer_rows().items():
            pieces.setdefault(name, []).append(values[row, :, None])
    return {name: torch.cat(parts, -1) for name, parts in pieces.items()}


def load_pasts(states: "Sequence[BandState]", saved: Mapping[str, Any], channels: Sequence[int]) -> None:
    """Continue from what `saved_pasts` has returned for the same layers.

    Raises:
        ValueError: a tensor is missing or has another shape; nothing is loaded then.
    """
    own = saved_pasts(states, channels)
    for name, value in own.items():
        if name not in saved or saved[name].shape != value.shape:
            found = tuple(saved[name].shape) if name in saved else "nothing"
            raise ValueError(f"the saved past has {found} under {name!r}, expected shape {tuple(value.shape)}")
    first = 0
    for layer, (state, row) in enumerate(_rows(states)):
        last = first + channels[layer]
        for name, values in state.past.channel_rows().items():
            values[row, :, : channels[layer]] = saved[name][:, first:last].to(values)
        for name, values in state.past.layer_rows().items():
            values[row] = saved[name][:, layer].to(values)
        first = last


def unpadded(saved: Mapping[str, Tensor], channels: Sequence[int]) -> dict[str, Tensor]:
    """Return what `saved_pasts` would have, of a past as checkpoints of version 2 have it: padded to the widest layer.

    Args:
        saved: tensors ``[L]`` or ``[L, 2]`` per layer; ``[L, C]``, ``[L, 2, C]`` or, of a window, ``[4, L, C]``.
        channels: the number of channels of each layer.
    """
    unpadded = {}
    for name, value in saved.items():
        if name in ("log_scale", "gradient_power", "gradient_steps"):
            unpadded[name] = value.reshape(len(channels), -1).T
            continue
        by_layer = value.movedim(1, 0) if name in ("window", "log_window") else value
        rows = [of[..., :width].reshape(-1, width) for of, width in zip(by_layer, channels, strict=True)]
        unpadded[name] = torch.cat(rows, -1)
    return unpadded


def _rows(states: "Sequence[BandState]") -> "Iterator[tuple[BandState, int]]":
    """The band and the row there of every layer, in order."""
    places = {layer: (state, row) for state in states for row, layer in enumerate(state.band.rows)}
    return (places[layer] for layer in sorted(places))
