import numpy as np
import pytest

from stabnorm.dashboard.heatmap import INFINITE, INK, MARK, NO_VALUE, PAPER, VIRIDIS, WIDTH, heatmap
from stabnorm.dashboard.text import number, shorten

RNG = np.random.default_rng(0)
BRIGHT, DARK = VIRIDIS[-1], VIRIDIS[0]


def layer_names(n: int) -> list[str]:
    return [f"model.blocks.{i}.norm" for i in range(n)]


def cells(image: np.ndarray, layers: int) -> np.ndarray:
    """Return [layers, WIDTH, 3], the middle line of each row, found by the colours alone: text and paper are grey."""
    coloured = np.ptp(image.astype(int), axis=2) > 60
    area = coloured | (image == NO_VALUE).all(axis=2)
    wide = np.flatnonzero(area.sum(axis=1) > 0.9 * WIDTH)
    top, bottom = wide[0], wide[-1] + 1
    left = int(np.flatnonzero(area[top:bottom].sum(axis=0) > 0.5 * (bottom - top))[0])
    row = (bottom - top) / layers
    middles = [int(top + (i + 0.5) * row) for i in range(layers)]
    colours: np.ndarray = image[middles, left : left + WIDTH]
    return colours


def has(image: np.ndarray, colour: tuple[int, int, int] | np.ndarray) -> np.ndarray:
    same: np.ndarray = np.all(image == colour, axis=-1)
    return same


@pytest.mark.parametrize("layers", [1, 12, 96, 300])
@pytest.mark.parametrize("steps", [1, 30, 20_000])
def test_any_size_is_a_picture_of_a_size_for_reading(steps: int, layers: int) -> None:
    image = heatmap(RNG.random((steps, layers)) + 1, 0, layer_names(layers), "amax")
    assert image.dtype == np.uint8
    height, width, channels = image.shape
    assert channels == 3
    assert 150 < height < 1500
    assert WIDTH < width < WIDTH + 500


@pytest.mark.parametrize("layers", [12, 96])
def test_a_spike_of_one_step_in_20000_is_bright_in_its_row(layers: int) -> None:
    values = np.exp(0.1 * RNG.normal(size=(20_000, layers)))
    values[13_337, 7] = 8.0
    bright = has(cells(heatmap(values, 0, layer_names(layers), "amax"), layers), BRIGHT)
    assert bright[7, 13_337 * WIDTH // 20_000]
    assert bright.mean() < 0.003


def test_a_rare_value_over_a_constant_is_bright() -> None:
    values = np.zeros((1000, 12))
    values[500, 3] = 0.3
    bright = has(cells(heatmap(values, 0, layer_names(12), "eps_share"), 12), BRIGHT)
    assert set(np.argwhere(bright)[:, 0]) == {3}


def test_the_first_layer_is_on_top_and_the_first_step_at_the_left() -> None:
    values = np.arange(12.0) + 100 * np.arange(30.0)[:, None]
    shown = cells(heatmap(values, 0, layer_names(12), "amax"), 12)
    assert shown[0, 0].tolist() == DARK.tolist()
    assert shown[-1, -1].tolist() == BRIGHT.tolist()
    assert (np.diff(shown[:, 450, 1].astype(int)) >= 0).all()  # the green channel grows along the whole map


def test_missing_values_are_grey_and_infinities_magenta() -> None:
    values = RNG.random((30, 12)) + 1
    values[:, 2] = np.nan
    values[10:15, 5] = np.nan
    values[20, 7], values[21, 8] = np.inf, -np.inf
    shown = cells(heatmap(values, 0, layer_names(12), "amax"), 12)
    assert has(shown[2], NO_VALUE).all()
    assert np.flatnonzero(has(shown[5], NO_VALUE)).tolist() == list(range(300, 450))
    assert np.flatnonzero(has(shown[7], INFINITE)).tolist() == list(range(600, 630))
    assert np.flatnonzero(has(shown[8], INFINITE)).tolist() == list(range(630, 660))


def test_one_infinite_step_is_not_lost_among_many() -> None:
    values = RNG.random((20_000, 12)) + 1
    values[7, 3] = -np.inf
    assert has(cells(heatmap(values, 0, layer_names(12), "amax"), 12), INFINITE).sum() == 1


def test_a_layer_that_ran_now_and_then_is_not_grey() -> None:
    values = np.full((20_000, 12), np.nan)
    values[::10] = RNG.random((2_000, 12)) + 1
    assert not has(cells(heatmap(values, 0, layer_names(12), "amax"), 12), NO_VALUE).any()


def test_marks_are_drawn_where_they_point() -> None:
    values, names = np.full((100, 12), 1.0), layer_names(12)
    plain = heatmap(values, 1000, names, "amax")
    assert not has(plain, MARK).any()
    assert (
        heatmap(values, 1000, names, "amax", marks=[(1, 0), (5000, 0), (1050, "unknown"), (1050, 12)]) == plain
    ).all()

    by_name = heatmap(values, 1000, names, "amax", marks=[(1050, names[6])])
    assert (heatmap(values, 1000, names, "amax", marks=[(1050, 6)]) == by_name).all()
    x = np.argwhere(has(by_name, MARK))[:, 1].mean()
    first_row = np.flatnonzero((plain == plain[plain.shape[0] // 2, 500]).all(axis=2).sum(axis=1) >= WIDTH)[0]
    left = int(np.flatnonzero((plain[first_row + 5] != PAPER).any(axis=1) & ~has(plain[first_row + 5], INK))[0])
    assert abs(x - left - 50.5 * WIDTH / 100) < 60  # names stand to the left of the map


@pytest.mark.parametrize("layers", [1, 9, 12, 96, 300])
def test_a_mark_lies_wholly_in_the_row_of_its_layer(layers: int) -> None:
    values, names = np.full((100, layers), 1.0), layer_names(layers)
    plain = heatmap(values, 1000, names, "amax")
    background = plain[67, -200] if layers > 1 else plain[80, plain.shape[1] // 2]
    rows_of_map = np.flatnonzero((plain == background).all(axis=2).sum(axis=1) >= WIDTH)
    top, height = int(rows_of_map[0]), len(rows_of_map) / layers
    for layer in {0, layers // 2, layers - 1}:
        marked = np.argwhere(has(heatmap(values, 1000, names, "amax", marks=[(1050, layer)]), MARK))[:, 0]
        assert top + layer * height <= marked.min()
        assert marked.max() < top + (layer + 1) * height


def test_the_first_and_the_last_step_can_be_marked() -> None:
    values, names = np.full((100, 12), 1.0), layer_names(12)
    columns = []
    for step in 1000, 1099:
        marked = has(heatmap(values, 1000, names, "amax", marks=[(step, 6)]), MARK)
        assert marked.any()
        columns.append(float(np.argwhere(marked)[:, 1].mean()))
    assert columns[1] - columns[0] == pytest.approx(0.99 * WIDTH, abs=2)


def test_colours_are_logarithmic_when_values_span_decades() -> None:
    values = np.tile(10.0 ** np.linspace(-4, 4, 12), (30, 1))
    shown = cells(heatmap(values, 0, layer_names(12), "amax"), 12)[:, 0]
    assert len(np.unique(shown, axis=0)) == 12
    linear = cells(heatmap(values, 0, layer_names(12), "amax", log=False), 12)[:, 0]
    assert len(np.unique(linear, axis=0)) < 8
    negative = heatmap(values - 1, 0, layer_names(12), "amax")
    assert (negative == heatmap(values - 1, 0, layer_names(12), "amax", log=False)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 1e30, np.nan, np.inf])
@pytest.mark.parametrize("log", [None, True, False])
def test_one_value_everywhere_can_be_drawn(value: float, log: bool | None) -> None:
    heatmap(np.full((5, 3), value), 0, ["a", "b", "c"], "amax", log=log)


def test_steps_may_have_gaps() -> None:
    steps = np.concatenate([np.arange(10), np.arange(500, 510)])
    heatmap(RNG.random((20, 2)), steps, ["a", "b"], "amax", marks=[(505, "a")], unit="x")
    heatmap(RNG.random((20, 2)), int(np.int64(7)), ["a", "b"], "amax")


@pytest.mark.parametrize("shape", [(0, 3), (5, 2), (4, 3), (5,)])
def test_misshapen_values_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="for 5 steps and 3 layers" if shape[0] else "for 0 steps"):
        heatmap(np.ones(shape), range(5) if shape[0] else 0, ["a", "b", "c"], "amax")


def test_the_input_is_not_changed() -> None:
    values = np.array([[1.0, np.nan], [np.inf, -1.0]])
    before = values.copy()
    heatmap(values, 0, ["a", "b"], "amax")
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize(
    "names",
    [
        [f"model.vision_tower.encoder.layers.{i}.self_attention_layer_norm_before" for i in range(48)],
        [f"{side}.a_rather_long_container_of_things.{i}.norm" for side in ("left", "right") for i in range(12)],
        ["a" * 80 + "x" + "b" * 80, "a" * 80 + "y" + "b" * 80],
        ["norm", "norm"],
        ["model.norm"],
        ["a.b", "a.b.c"],
        [],
    ],
)
def test_shortened_names_stay_different(names: list[str]) -> None:
    short = shorten(names, 24)
    assert len(set(short)) == len(set(names))
    assert all(len(name) <= 24 for name in short) or "a" * 80 in names[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-0.00012345, "-0.000123"), (999.7, "1,000"), (123456, "123,456"), (1e6, "1e6"), (-1e-12, "-1e-12")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
