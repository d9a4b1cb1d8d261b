"""A stretch of a run in as many columns as a picture has: the extremes of each column are kept.

Zooming in asks for a shorter stretch in as many columns, and so it refines.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stabnorm.monitor.baseline import Baseline

Floats = npt.NDArray[np.floating[Any]]
Steps = npt.NDArray[np.int64]


class Columns(NamedTuple):
    """How steps share columns.

    Attributes:
        edges: first step of each column, and the end of the last one: ``[columns + 1]``.
        starts: index of the first of the steps in each column, ``[columns + 1]``; a column may have none.
    """

    edges: Steps
    starts: npt.NDArray[np.int64]


def columns_of(steps: Steps, first: int, last: int, most: int) -> Columns:
    """Share the steps from ``first`` to ``last`` among at most ``most`` columns of equally many steps.

    Example:
        >>> columns_of(np.arange(10), 0, 9, 4).edges
        array([ 0,  3,  6,  9, 12])
    """
    each = max(1, -(-(last + 1 - first) // max(1, most)))
    edges = np.arange(first, last + each + 1, each, dtype=np.int64)
    edges = edges[: 2 + (last - first) // each]
    return Columns(edges, np.searchsorted(steps, edges))


class Tile(NamedTuple):
    """One statistic of all layers in columns, ``[columns, layers]`` each; NaN where a column has no value.

    Attributes:
        low: smallest value.
        high: largest value, infinite ones included.
        step: the step of the column that is furthest from what is usual, or has the largest value if that is unknown;
            -1 if there is no value.
        value: the value at this step.
        usual: the usual value at this step.
        scale: the robust standard deviation of the logarithm at this step.
    """

    low: Floats
    high: Floats
    step: Steps
    value: Floats
    usual: Floats
    scale: Floats


def extremes(values: Floats, columns: Columns) -> tuple[Floats, Floats]:
    """Return smallest and largest value of each column, ``[columns, ...]``; NaN for a column without values.

    Example:
        >>> low, high = extremes(np.array([1.0, 5.0, np.nan, 2.0]), columns_of(np.arange(4), 0, 3, 2))
        >>> low, high
        (array([1., 2.]), array([5., 2.]))
    """
    return _reduce(np.fmin, values, columns.starts), _reduce(np.fmax, values, columns.starts)


def _reduce(of: Any, values: Floats, starts: npt.NDArray[np.int64]) -> Floats:
    """Reduce each column; numpy would give an empty one the value of its neighbour."""
    out = np.full((len(starts) - 1, *values.shape[1:]), np.nan, values.dtype)
    filled = np.flatnonzero(starts[1:] > starts[:-1])
    if filled.size:
        inside = values[: starts[-1]]
        out[filled] = of.reduceat(inside, starts[filled], axis=0)
    return out


def tile_of(values: Floats, steps: Steps, baseline: Baseline, columns: Columns) -> Tile:
    """Sum up one statistic in columns.

    Args:
        values: of all steps, ``[steps, layers]``.
        steps: of the record.
        baseline: of the same values.
        columns: from `columns_of`.
    """
    low, high = extremes(values, columns)
    first, end = columns.starts[0], columns.starts[-1]
    part = values[first:end]
    at = np.arange(first, end)
    scores = np.abs(baseline.scores(part, at))
    # Where nothing is known yet, the largest value stands for the column; an infinite one is furthest of all.
    rank = np.where(np.isnan(scores), -1 / (2 + np.abs(np.where(np.isfinite(part), part, 0))), scores)
    rank = np.where(np.isnan(part), -np.inf, np.where(np.isinf(part), np.inf, rank))
    starts = columns.starts - first
    index = np.full(low.shape, -1, np.int64)
    lengths = np.diff(starts)
    for i in np.flatnonzero(lengths):
        index[i] = starts[i] + rank[starts[i] : starts[i + 1]].argmax(0)
    known = ~np.isnan(high)
    index = np.where(known, index, -1)
    take = np.maximum(index, 0)
    layer = np.arange(values.shape[1])
    if not len(part):
        empty = np.full(low.shape, np.nan, np.float32)
        return Tile(low, high, index, empty, empty.copy(), empty.copy())
    value, usual, scale = (
        np.where(known, source[take, layer], np.nan) for source in (part, baseline.usual(at), baseline.scale(at))
    )
    return Tile(low, high, np.where(known, steps[first + take], -1), value, usual, scale)
