"""Parts of a record, each with some steps of some series, and how they become one record."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

AXES = ("step", "layer", "rank")

Array = npt.NDArray[np.float32]
Steps = npt.NDArray[np.int64]


def check_shape(name: str, values: npt.NDArray[Any], num_steps: int, num_layers: int) -> None:
    """Check the shape of a series.

    Raises:
        ValueError: the series is none of so many steps and layers.
    """
    if not 1 <= values.ndim <= len(AXES) or values.shape[:2] != (num_steps, num_layers)[: values.ndim]:
        raise ValueError(
            f"series {name!r} has shape {values.shape} in a block of {num_steps} steps and {num_layers} layers; "
            "give it as [steps], [steps, layers] or [steps, layers, k]"
        )


class Part(NamedTuple):
    """The part of a record that was read. It has its steps even without series, so that no step is missing."""

    first_step: int
    num_steps: int
    layers: tuple[str, ...]
    series: Mapping[str, Array]
    companion: str

    def checked(self) -> "Part":
        """Return the part itself.

        Raises:
            ValueError: a series has another shape than the part.
        """
        for name, values in self.series.items():
            check_shape(name, values, self.num_steps, len(self.layers))
        return self


def stitched(parts: Sequence[Part]) -> tuple[tuple[str, ...], Steps, dict[str, Array]]:
    """Combine parts, of which a later one replaces the steps of an earlier one.

    Returns:
        All layers in order of appearance, all steps in ascending order, and the series, ``[steps, ...]``, NaN where a
        step or a layer has no value.
    """
    layers = tuple(dict.fromkeys(itertools.chain.from_iterable(part.layers for part in parts)))
    spans = [np.arange(part.first_step, part.first_step + part.num_steps) for part in parts]
    steps = np.unique(np.concatenate(spans)) if spans else np.empty(0, np.int64)
    having: dict[str, list[Part]] = {}
    for part in parts:
        for name in part.series:
            having.setdefault(name, []).append(part)
    return layers, steps, {name: _stitch(name, having[name], steps, layers) for name in having}


def _stitch(name: str, parts: Sequence[Part], steps: Steps, layers: Sequence[str]) -> Array:
    """Combine the parts of one series."""
    axes = parts[-1].series[name].ndim  # a series may have got another meaning; only the last one can be told
    parts = [part for part in parts if part.series[name].ndim == axes]
    shapes = [part.series[name].shape for part in parts]
    # The layers and k may change on a resume; a value that one of the runs does not have is NaN.
    column = {layer: i for i, layer in enumerate(layers)}
    trailing = [max(sizes) for sizes in zip(*(shape[2:] for shape in shapes), strict=True)]
    out = np.full((len(steps), len(layers), *trailing)[: len(shapes[0])], np.nan, np.float32)
    for part, shape in zip(parts, shapes, strict=True):
        rows = out[int(np.searchsorted(steps, part.first_step)) :][: part.num_steps]
        rows[...] = np.nan
        where: tuple[Any, ...] = (slice(None), [column[layer] for layer in part.layers], *map(slice, shape[2:]))
        rows[where[: len(shape)]] = part.series[name]
    return out
