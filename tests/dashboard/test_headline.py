import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from stabnorm.dashboard.headline import custom_scalars_layout, headline
from stabnorm.monitor.record import Block

RNG = np.random.default_rng(0)
STATISTICS = ("crest", "var_fluctuation", "mean_discrepancy", "amax", "token_std_mean")


def block(layers: int, steps: int = 10) -> Block:
    names = tuple(f"layers.{i}" for i in range(layers))
    return Block(0, names, {name: RNG.random((steps, layers), np.float32) for name in STATISTICS})


def test_the_keys_are_few_and_always_the_same() -> None:
    keys = [
        list(headline(part, STATISTICS, alerts=0, overhead=0.0))
        for part in (block(12), block(96), Block(0, (), {}), block(3, steps=1))
    ]
    assert len(keys[0]) <= 12
    assert all(other == keys[0] for other in keys)
    assert "stability/token_std_mean_p50" in keys[0]
    assert all(
        key.startswith(("stability-", "stability_cost-"))
        for key in headline(block(3), STATISTICS, alerts=0, overhead=0.0, separator="-")
    )


def test_what_it_says_is_right() -> None:
    values = np.array([[1.0, 5.0, 3.0], [3.0, 7.0, np.nan]])
    said = headline(Block(0, ("a", "b", "c"), {"token_std_mean": values}), STATISTICS, alerts=3, overhead=1.5)
    assert said["stability/token_std_mean_p50"] == 3.0  # of 2, 6, 3
    assert said["stability/token_std_mean_p90"] == pytest.approx(np.percentile([2, 6, 3], 90))
    assert said["stability/token_std_mean_worst"] == 7.0
    assert said["stability/alerts"] == 3.0
    assert said["stability_cost/percent_of_step"] == 1.5
    assert math.isnan(said["stability/amax_p50"])
    assert all(type(value) is float for value in said.values())


def test_no_scalar_is_a_layers_number_and_the_cost_is_no_health() -> None:
    """A chart smooths its scalars: between layers 2 and 4 it would name layer 3."""
    keys = headline(block(12), STATISTICS, alerts=0, overhead=1.0)
    assert not any("layer" in key for key in keys)
    assert [key for key in keys if not key.startswith("stability/")] == ["stability_cost/percent_of_step"]


def test_the_charts_have_plain_names() -> None:
    titles = list(custom_scalars_layout(STATISTICS)["Stability"])
    assert titles[0].startswith("input scale over the layers")
    assert any(title.startswith("largest input, worst layer") for title in titles)


def test_an_infinity_is_the_worst_and_nothing_else() -> None:
    values = np.array([[1.0, np.inf, 3.0, np.nan]] * 4)
    said = headline(Block(0, tuple("abcd"), {"amax": values}), STATISTICS, alerts=0, overhead=0.0)
    assert said["stability/amax_p50"] == 2.0
    assert said["stability/amax_worst"] == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_block_without_a_finite_value(value: float) -> None:
    said = headline(Block(0, ("a", "b"), {"amax": np.full((3, 2), value)}), STATISTICS, alerts=0, overhead=0.0)
    assert math.isnan(said["stability/amax_p50"])
    np.testing.assert_equal(said["stability/amax_worst"], value)


def test_the_layout_names_only_tags_that_are_written(tmp_path: Path) -> None:
    keys = headline(block(2), STATISTICS, alerts=0, overhead=0.0)
    charts = custom_scalars_layout(STATISTICS)["Stability"].values()
    tags = {tag.removeprefix("^").removesuffix("$") for _, tags in charts for tag in tags}
    assert tags <= set(keys)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_custom_scalars(custom_scalars_layout(STATISTICS))
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert accumulator.Tags()["tensors"] == ["custom_scalars__config__"]


def test_presets_without_the_usual_statistics_get_scalars_of_what_they_have() -> None:
    values = {name: np.ones((3, 2), np.float32) for name in ("var_fluctuation", "absmax_fluctuation")}
    for watched in (tuple(values), ("absmax_fluctuation",)):
        scalars = headline(
            Block(0, ("a", "b"), {name: values[name] for name in watched}), watched, alerts=0, overhead=0
        )
        assert not any(math.isnan(value) for value in scalars.values())
