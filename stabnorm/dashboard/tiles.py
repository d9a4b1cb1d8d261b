"""A stretch of a run in as many columns as a picture has: the extremes of each column are kept.

Zooming in asks for a shorter stretch in as many columns, and so it refines.
"""

import itertools
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
        step: the step with the smallest or the largest value of the column, whichever is further from what was usual at
            that step; -1 if there is no value.
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
    if not values.shape[1] or columns.starts[-1] <= columns.starts[0]:
        empty = np.full(low.shape, np.nan, np.float32)
        return Tile(low, high, np.full(low.shape, -1, np.int64), empty, empty, empty)
    layer = np.arange(values.shape[1])
    ends = [_places(values, columns.starts, bound) for bound in (low, high)]
    far = [_distance(values[at, layer], baseline.cells(at)[0]) for at in ends]
    at = np.where(far[0] > far[1], *ends)
    known = ~np.isnan(high)
    value, usual, scale = (np.where(known, source, np.nan) for source in (values[at, layer], *baseline.cells(at)))
    return Tile(low, high, np.where(known, steps[at], -1), value, usual, scale)


def _places(values: Floats, starts: npt.NDArray[np.int64], bound: Floats) -> npt.NDArray[np.int64]:
    """Return the index of the first step of each column that has the column's bound; any step if there is none."""
    at = np.empty(bound.shape, np.int64)
    last = len(values) - 1
    for column, (begin, end) in enumerate(itertools.pairwise(starts.tolist())):
        found = (values[begin:end] == bound[column]).argmax(0) if end > begin else 0
        at[column] = np.minimum(begin + found, last)
    return at


def _distance(values: Floats, usual: Floats) -> Floats:
    """Return how far values are from what was usual; an infinite one is furthest of all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        far = np.abs(np.log(values / usual))
    # Where nothing is usual yet, the larger value stands for the column.
    return np.where(np.isinf(values), np.inf, np.where(np.isnan(far), -1 / (2 + np.abs(values)), far))
