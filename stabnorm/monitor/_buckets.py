"""Old steps in buckets: of each bucket the extremes stay at their own steps, and the other steps share one mean.

A bucket is as many steps as its size, and begins at a multiple of it. Of a series, ``[steps]`` or ``[steps, layers]``,
it keeps three numbers for each layer: the smallest, the largest, and the mean of the finite others; and three places:
of the smallest, of the largest, and of the first NaN. `opened` puts them back, so that whoever reads the steps finds as
many as there were, and no extreme is lost or moved. What is put into buckets again keeps its extremes as well.

Of the k largest, ``[steps, layers, k]``, a bucket keeps those of one step, as a mean of channel numbers would be none.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stabnorm.monitor._parts import Array

RANKED = ("top_channel_values", "top_channel_ids")  # belong together; the first one says which step a bucket keeps


class Buckets(NamedTuple):
    """A series in buckets.

    Attributes:
        values: smallest, largest and mean of the others, ``[3, buckets]`` or ``[3, buckets, layers]``; of the k
            largest, ``[buckets, layers, k]``.
        places: of the smallest, the largest and the first NaN in their bucket, the same shape, the bucket's size where
            there is none; empty for the k largest.
    """

    values: Array
    places: npt.NDArray[np.unsignedinteger[Any]]


def in_buckets(series: Mapping[str, Array], first_step: int, size: int) -> dict[str, Buckets]:
    """Put series of the same steps into buckets.

    Args:
        series: name -> ``[steps, ...]``.
        first_step: the step of row 0; row i is step ``first_step + i``.
        size: steps of a bucket.

    >>> values = np.array([1, 1, 9, 1, 0, 1, 1, 1], np.float32)
    >>> put = in_buckets({"loss": values}, 0, 8)["loss"]
    >>> put.values.ravel().tolist(), put.places.ravel().tolist()
    ([0.0, 9.0, 1.0], [4, 2, 8])
    >>> opened(put, 0, 8, 8).tolist() == values.tolist()
    True
    """
    ranked = {name: values for name, values in series.items() if values.ndim == 3}
    guide = ranked.get(RANKED[0], next(iter(ranked.values()), None))
    at = None if guide is None else _loudest(_split(guide, first_step, size))
    return {
        name: _extremes(values, first_step, size)
        if name not in ranked or at is None
        else Buckets(_row(_split(values, first_step, size), at), np.empty(0, np.uint8))
        for name, values in series.items()
    }


def opened(buckets: Buckets, first_step: int, num_steps: int, size: int) -> Array:
    """Return the steps of a series in buckets, ``[num_steps, ...]``."""
    begin = first_step % size
    if not buckets.places.size:
        return np.repeat(buckets.values, size, axis=0)[begin : begin + num_steps]
    low, high, others = buckets.values
    low_at, high_at, nan_at = buckets.places[:, :, None]
    place = np.arange(size).reshape(-1, *(1,) * (low.ndim - 1))
    steps = np.where(place == nan_at, np.float32(np.nan), others[:, None])
    steps = np.where(place == low_at, low[:, None], steps)
    steps = np.where(place == high_at, high[:, None], steps)
    return steps.reshape(-1, *low.shape[1:])[begin : begin + num_steps]


def _split(values: Array, first_step: int, size: int) -> Array:
    """Return ``[buckets, size, ...]``, NaN where a bucket begins before the first step or ends after the last one."""
    before = first_step % size
    after = -(before + len(values)) % size
    padded = np.pad(values, ((before, after), *((0, 0),) * (values.ndim - 1)), constant_values=np.nan)
    return padded.reshape(-1, size, *values.shape[1:])


def _extremes(values: Array, first_step: int, size: int) -> Buckets:
    split = _split(values, first_step, size)
    missing = np.isnan(split)
    known = ~missing
    low_at = np.where(missing, np.inf, split).argmin(1)
    high_at = np.where(missing, -np.inf, split).argmax(1)
    # Where all known values are infinite, the place may be that of a NaN.
    low_at, high_at = (np.where(_taken(known, at), at, known.argmax(1)) for at in (low_at, high_at))
    low, high = _taken(split, low_at), _taken(split, high_at)
    place = np.arange(size).reshape(-1, *(1,) * (values.ndim - 1))
    rest = np.isfinite(split) & (place != low_at[:, None]) & (place != high_at[:, None])
    count = rest.sum(1)
    with np.errstate(invalid="ignore"):  # of infinite extremes
        between = np.where(np.isinf(high), low, np.where(np.isinf(low), high, (low + high) / 2))
    mean = np.where(rest, split, 0).sum(1, dtype=np.float64) / np.maximum(count, 1)
    others = np.where(count > 0, mean, between).astype(np.float32)
    lost = missing & _inside(len(values), first_step, size, values.ndim)
    places = [np.where(known.any(1), low_at, size), np.where(known.any(1), high_at, size)]
    places.append(np.where(lost.any(1), lost.argmax(1), size))
    return Buckets(np.stack([low, high, others]).astype(np.float32), np.stack(places).astype(np.min_scalar_type(size)))


def _inside(num_steps: int, first_step: int, size: int, ndim: int) -> npt.NDArray[np.bool_]:
    """Return ``[buckets, size, 1, ...]``, whether a place of a bucket belongs to the steps."""
    real = ~np.isnan(_split(np.zeros(num_steps, np.float32), first_step, size))
    return real.reshape(*real.shape, *(1,) * (ndim - 1))


def _taken(split: npt.NDArray[Any], at: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    """Return the value at a place of each bucket and layer."""
    return np.take_along_axis(split, at[:, None], axis=1)[:, 0]


def _loudest(split: Array) -> npt.NDArray[np.intp]:
    """Return the place of the step with the largest value, ``[buckets, layers]``."""
    at: npt.NDArray[np.intp] = np.where(np.isnan(split), -np.inf, split).max(-1).argmax(1)
    return at


def _row(split: Array, at: npt.NDArray[np.intp]) -> Array:
    """Return the k values of a place of each bucket and layer."""
    return np.take_along_axis(split, at[:, None, :, None], axis=1)[:, 0]
