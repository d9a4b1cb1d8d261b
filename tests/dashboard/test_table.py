from typing import Any

import numpy as np
import pytest

from stabnorm.dashboard.table import Row, format_table, layers_worth_a_look, markdown_table

RNG = np.random.default_rng(0)
LAYERS = [f"model.layers.{i}.norm" for i in range(12)]
THRESHOLDS = {"mean_discrepancy": 0.5, "crest": 1000.0}


def healthy(steps: int = 200) -> dict[str, np.ndarray]:
    return {
        "mean_discrepancy": 0.1 * np.exp(0.1 * RNG.normal(size=(steps, 12))),
        "token_mean_mean": 0.01 * RNG.normal(size=(steps, 12)),
        "tokens": np.full((steps, 12), 512.0),
        "loss": np.ones(steps),
        "top_channel_ids": np.ones((steps, 12, 2)),
    }


def alert(step: int, layer: int, reason: str = "amax jumped: look at the input") -> dict[str, Any]:
    return {"step": step, "layer": LAYERS[layer], "statistic": "amax", "value": "Infinity", "reason": reason}


def test_a_healthy_run_has_a_table_that_alarms_nobody() -> None:
    rows = layers_worth_a_look(LAYERS, healthy(), [], thresholds=THRESHOLDS)
    assert 1 <= len(rows) <= 3
    assert not any(row.fault for row in rows)
    text = format_table(rows, steps=200)
    assert text.splitlines()[0] == "stabnorm: nothing alarming was seen in 200 steps"
    assert "for information, not a fault" in text
    assert markdown_table(rows).startswith("stabnorm: nothing alarming was seen")


def test_the_layer_that_lies_apart_is_named_with_the_statistic() -> None:
    series = healthy()
    series["mean_discrepancy"][150:, 4] *= 3
    row = layers_worth_a_look(LAYERS, series, [], steps=range(1000, 1200), thresholds=THRESHOLDS)[0]
    assert (row.layer, row.statistic, row.step, row.fault) == (LAYERS[4], "mean_discrepancy", 1199, False)
    assert row.value == pytest.approx(0.3, rel=0.2)


def test_alerts_come_first_each_layer_once_by_its_first_alert() -> None:
    series = healthy()
    series["mean_discrepancy"][:, [2, 5, 7]] = [0.7, 0.9, 0.6]
    series["mean_discrepancy"][:, 9] = np.nan
    series["token_mean_mean"][:, 9] = np.nan
    alerts = [alert(90, 7), alert(30, 3), alert(60, 3), alert(70, 3)]
    rows = layers_worth_a_look(LAYERS, series, alerts, thresholds=THRESHOLDS)
    assert [row.layer for row in rows[:5]] == [LAYERS[i] for i in (3, 7, 5, 2, 9)]
    assert [row.fault for row in rows[:5]] == [True] * 5
    assert (rows[0].step, rows[0].value) == (30, np.inf)
    assert rows[0].reason == "amax jumped: look at the input (2 more alerts)"
    assert "never ran" in rows[4].reason
    assert len({row.layer for row in rows}) == len(rows)


def test_a_layer_that_got_no_tokens_never_ran() -> None:
    series = healthy()
    series["tokens"][:, 1] = 0
    rows = layers_worth_a_look(LAYERS, series, [])
    assert [row.layer for row in rows if row.fault] == [LAYERS[1]]


def test_a_threshold_crossed_once_is_left_to_the_alerts() -> None:
    series = healthy()
    series["mean_discrepancy"][195, 4] = 9.0
    assert not any(row.fault for row in layers_worth_a_look(LAYERS, series, [], thresholds=THRESHOLDS))


@pytest.mark.parametrize(
    "series", [{}, {"amax": np.empty((0, 12))}, {"amax": np.full((5, 12), np.nan)}, {"amax": np.zeros((1, 12))}]
)
def test_little_to_look_at_is_no_error(series: dict[str, np.ndarray]) -> None:
    rows = layers_worth_a_look(LAYERS, series, [], thresholds={"amax": 1.0, "crest": 2.0})
    assert format_table(rows, steps=0).startswith("stabnorm: ")
    markdown_table(rows)


def test_the_text_fits_100_columns_and_says_how_many_more() -> None:
    layers = [
        f"model.vision_tower.encoder.layers.{i}.self_attention_layer_norm_before_the_projection" for i in range(48)
    ]
    reason = "it is 312 times its usual value (the median of the last 128 steps, 40 standard deviations off): " * 3
    rows = [Row(layer, reason, "running_mean_distance", -1.2345e-12, 1_234_567) for layer in layers]
    lines = format_table(rows, steps=20_000).splitlines()
    assert lines[0] == "stabnorm: 48 layers worth a look after 20,000 steps"
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "and 40 more"
    assert sum("running_mean_distance" in line for line in lines) == 8
    assert len(set(line[:46] for line in lines if "1,234,567" in line)) == 8


def test_markdown_keeps_its_columns() -> None:
    rows = [Row("a.norm", "max |x| jumped", "amax", 3.0, 7)] * 10
    text = markdown_table(rows)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 8
    assert table[2] == r"| `a.norm` | `amax` | 3 | 7 | max \|x\| jumped |"
    assert text.splitlines()[-1] == "and 2 more"
