"""`monitor.plot()` draws what the history holds."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
needs_matplotlib = pytest.mark.skipif(not HAS_MATPLOTLIB, reason="the extra [plot] is not installed")


@pytest.fixture
def monitor() -> StabilityMonitor:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))
    with StabilityMonitor(model, companions=["weights"]) as watching:
        for step in range(60):
            model(torch.randn(40, 8) * (3 if step == 55 else 1)).square().mean().backward()
            watching.step()
    return watching


@pytest.fixture
def pyplot() -> Iterator[Any]:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def mesh_of(figure: Any) -> np.ndarray:
    values: np.ndarray = figure.axes[0].collections[0].get_array()
    return values.reshape(2, -1)


@needs_matplotlib
def test_the_map_is_each_layer_against_its_own_past(monitor: StabilityMonitor, pyplot: Any) -> None:
    figure = monitor.plot()
    shown = mesh_of(figure)
    assert shown.shape == (2, 60)
    assert np.isnan(np.asarray(shown[:, :48], float)).all(), "nothing is usual yet"
    assert shown[0, 55] == pytest.approx(np.log2(3), abs=0.2)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["0", "2"]


@needs_matplotlib
def test_values_are_those_of_the_history(monitor: StabilityMonitor, pyplot: Any) -> None:
    figure = monitor.plot("amax", colour="value")
    np.testing.assert_array_equal(mesh_of(figure), monitor.history()["amax"].numpy().T)
    _, ax = pyplot.subplots()
    assert monitor.plot("crest", colour="sigmas", ax=ax) is ax.figure


@needs_matplotlib
def test_companions_have_plots_too(monitor: StabilityMonitor, pyplot: Any) -> None:
    assert monitor.plot("weight_norm", companion="weights", colour="value") is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistic": "amx"}, "did you mean 'amax'"),
        ({"companion": "weight"}, "did you mean 'weights'"),
        ({"colour": "red"}, "times, value, sigmas"),
    ],
)
def test_what_is_unknown_is_refused(monitor: StabilityMonitor, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        monitor.plot(**arguments)  # type: ignore[arg-type]


def test_a_monitor_without_steps_says_so() -> None:
    with pytest.raises(ValueError, match="no step"):
        StabilityMonitor(nn.LayerNorm(4)).plot()


@pytest.mark.skipif(HAS_MATPLOTLIB, reason="matplotlib is there")
def test_without_matplotlib_the_extra_is_named(monitor: StabilityMonitor) -> None:
    with pytest.raises(ImportError, match=r"stabnorm\[plot\]"):
        monitor.plot()
