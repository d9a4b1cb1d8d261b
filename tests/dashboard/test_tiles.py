"""A picture of few columns loses no extreme of many steps, and zooming refines."""

import numpy as np
import pytest

from stabnorm.dashboard.tiles import Tile, columns_of, extremes, tile_of
from stabnorm.monitor.baseline import Baseline
from tests.dashboard.records import calm


def tile(values: np.ndarray, first: int, last: int, most: int) -> tuple[Tile, np.ndarray]:
    steps = np.arange(len(values))
    baseline = Baseline(values.shape[1])
    baseline.extend(values)
    columns = columns_of(steps, first, last, most)
    return tile_of(values, steps, baseline, columns), columns.edges


@pytest.mark.parametrize("most", [1, 7, 50, 400, 5000])
def test_a_spike_of_one_step_is_in_every_resolution(most: int) -> None:
    values = calm(1000)
    values[777, 4], values[778, 2] = 50.0, 0.001
    shown, edges = tile(values, 0, 999, most)
    column = np.searchsorted(edges, [777, 778], "right") - 1
    assert shown.high[column[0], 4] == 50.0
    assert shown.low[column[1], 2] == 0.001
    assert (shown.step[column[0], 4], shown.value[column[0], 4]) == (777, 50.0)
    assert (shown.step[column[1], 2], shown.value[column[1], 2]) == (778, 0.001)


def test_zooming_in_narrows_the_columns_to_a_step() -> None:
    values = calm(1000)
    widths = [np.diff(tile(values, first, last, 100)[1])[0] for first, last in ((0, 999), (400, 599), (480, 520))]
    assert widths == [10, 2, 1]
    shown, edges = tile(values, 480, 520, 100)
    np.testing.assert_array_equal(shown.value, values[480:521])
    np.testing.assert_array_equal(edges, np.arange(480, 522))


def test_not_finite_values_are_kept_apart_from_none() -> None:
    values = calm(300)
    values[100, 0], values[200:, 1] = np.inf, np.nan
    shown, _ = tile(values, 0, 299, 30)
    assert shown.high[10, 0] == np.inf
    assert shown.step[10, 0] == 100
    assert np.isnan(shown.high[20:, 1]).all()
    assert (shown.step[20:, 1] == -1).all()


def test_a_column_without_steps_is_empty() -> None:
    steps = np.r_[np.arange(10), np.arange(40, 50)]
    columns = columns_of(steps, 0, 49, 5)
    low, high = extremes(np.arange(20.0), columns)
    np.testing.assert_array_equal(high, [9, np.nan, np.nan, np.nan, 19])
    np.testing.assert_array_equal(low, [0, np.nan, np.nan, np.nan, 10])


@pytest.mark.parametrize(("first", "last", "most"), [(0, 0, 600), (5, 5, 1), (0, 999, 0), (990, 5000, 10)])
def test_any_window_has_columns(first: int, last: int, most: int) -> None:
    shown, edges = tile(calm(1000), first, last, most)
    assert edges[0] == first
    assert edges[-1] > last
    assert len(shown.high) == len(edges) - 1
