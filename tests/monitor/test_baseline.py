"""What the page calls usual is what the detector calls usual."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stabnorm.monitor.baseline import Baseline
from stabnorm.monitor.detect import RobustDetector
from stabnorm.monitor.statistics import CATALOGUE


def history() -> np.ndarray:
    """Steps of five layers: calm, with an infinity, growing, with a gap, and one that starts late."""
    values = np.exp(0.1 * np.random.default_rng(0).standard_normal((600, 5))).astype(np.float32)
    values[350, 1] = np.inf
    values[400:, 2] *= np.exp(0.01 * np.arange(200))
    values[200:260, 3] = np.nan
    values[:100, 4] = np.nan
    return values


@pytest.mark.parametrize("negligible", [0.0, 1.0])
def test_it_is_the_detectors_own_median_and_scale_at_every_step(negligible: float) -> None:
    values = history()
    statistic = replace(CATALOGUE["token_std_mean"], negligible=negligible)
    detector = RobustDetector([statistic], list("abcde"))
    baseline = Baseline(5, statistic.floor, negligible)
    baseline.extend(values)
    for step in range(len(values)):
        row = torch.from_numpy(values[step : step + 1, :, None])
        detector.update(step, row, torch.full((1, 5), 64), torch.zeros(1, 5, dtype=torch.bool))
        if step >= 150 and step % 7 == 0:
            state, at = detector.state_dict(), np.array([step])
            np.testing.assert_allclose(baseline.usual(at)[0], state["fast"]["center"][:, 0].exp(), rtol=1e-5)
            np.testing.assert_allclose(baseline.scale(at)[0], state["fast"]["scale"][:, 0], rtol=1e-4)


def test_steps_may_arrive_in_any_pieces() -> None:
    values = history()
    whole, pieces = Baseline(5), Baseline(5)
    whole.extend(values)
    for begin in range(0, 600, 37):
        pieces.extend(values[begin : begin + 37])
    at = np.arange(600)
    np.testing.assert_array_equal(whole.usual(at), pieces.usual(at))
    np.testing.assert_array_equal(whole.armed_at(), pieces.armed_at())


def test_nothing_is_usual_before_it_was_learnt_and_no_layer_is_armed_before_its_256th_value() -> None:
    baseline = Baseline(5)
    baseline.extend(history())
    usual = baseline.usual(np.arange(600))
    assert np.isnan(usual[:48]).all()
    assert not np.isnan(usual[48:, 0]).any()
    assert np.isnan(usual[:148, 4]).all()
    assert baseline.armed_at().tolist() == [256, 256, 256, 316, 356]
