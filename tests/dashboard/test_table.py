from typing import Any

import numpy as np
import pytest

from stabnorm.dashboard.table import Row, format_table, layers_worth_a_look, markdown_table

RNG = np.random.default_rng(0)
LAYERS = [f"model.layers.{i}.norm" for i in range(12)]
THRESHOLDS = {"mean_discrepancy": (0.5, "recompute"), "crest": (1000.0, "clip")}


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


def test_a_healthy_run_alarms_nobody_and_has_no_row() -> None:
    rows = layers_worth_a_look(LAYERS, healthy(), [], thresholds=THRESHOLDS)
    assert rows == []
    assert format_table(rows, steps=200) == "stabnorm: nothing alarming was seen in 200 steps"
    assert markdown_table(rows) == "stabnorm: nothing alarming was seen"


def test_layers_whose_scale_moved_are_told_the_furthest_first_and_are_no_fault() -> None:
    series = healthy() | {"token_std_mean": np.exp(0.1 * RNG.normal(size=(200, 12)))}
    series["token_std_mean"][150:, [4, 6, 8, 9]] *= [20, 131, 0.1, 2]
    rows = layers_worth_a_look(LAYERS, series, [], steps=range(1000, 1200), thresholds=THRESHOLDS)
    assert [(row.layer, row.step, row.fault) for row in rows] == [(LAYERS[i], 1199, False) for i in (6, 4, 8)]
    assert "grew 1" in rows[0].reason
    assert "3 of 12 layers grew or shrank 3 times or more" in rows[0].reason
    assert "shrank to 0.1" in rows[2].reason
    assert rows[0].value == pytest.approx(131, rel=0.2)


def test_the_first_tenth_is_no_part_of_what_a_scale_is_compared_with() -> None:
    scale = np.repeat([1.0, 1.0, 4.0], [2, 4, 14])[:, None]  # a median of 2.5 from the tenth to the half, of 1 to it
    assert layers_worth_a_look(LAYERS[:1], {"amax": scale}, []) == []
    scale[10:] = 8.0
    (row,) = layers_worth_a_look(LAYERS[:1], {"amax": scale}, [])
    assert "grew 3.2 times" in row.reason


def test_a_layer_that_stays_under_what_it_should_have_is_named() -> None:
    series = healthy() | {"headroom": np.full((200, 12), 9.0)}
    series["headroom"][150:, 4] = 0.5
    (row,) = layers_worth_a_look(LAYERS, series, [], thresholds=THRESHOLDS, least={"headroom": (1.0, "use bfloat16")})
    assert (row.layer, row.statistic, row.value, row.fault) == (LAYERS[4], "headroom", 0.5, True)
    assert row.reason == "under 1 in most of the run's last tenth: use bfloat16"


def test_a_threshold_may_be_zero() -> None:
    thresholds = {"token_mean_mean": (0.0, "center it")}
    series = healthy() | {"token_mean_mean": np.full((200, 12), -1.0)}
    series["token_mean_mean"][:, [3, 5]] = [0.1, 0.2]
    rows = layers_worth_a_look(LAYERS, series, [], thresholds=thresholds)
    assert [row.layer for row in rows] == [LAYERS[5], LAYERS[3]]


def test_an_alert_says_what_came_of_it() -> None:
    series = healthy() | {"token_std_mean": np.ones((200, 12))}
    series["token_std_mean"][150:, 3] = 50
    (row,) = layers_worth_a_look(LAYERS, series, [alert(150, 3)], thresholds=THRESHOLDS)
    assert row.fault
    assert row.reason.startswith("amax jumped: look at the input. The scale of its input grew 50 times")


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
    assert "saw no valid token" in rows[4].reason
    assert rows[1].reason == "amax jumped: look at the input"
    assert rows[2].reason == "over 0.5 in most of the run's last tenth: recompute"
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
    rows = layers_worth_a_look(LAYERS, series, [], thresholds={"amax": (1.0, ""), "crest": (2.0, "")})
    assert format_table(rows, steps=0).startswith("stabnorm: ")
    markdown_table(rows)


def test_the_text_fits_100_columns_and_says_how_many_more() -> None:
    layers = [
        f"model.vision_tower.encoder.layers.{i}.self_attention_layer_norm_before_the_projection" for i in range(48)
    ]
    reason = "it is 312 times its usual value (the median of the last 128 steps, 40 standard deviations off): " * 3
    rows = [Row(layer, reason, "running_mean_distance", -1.2345e-12, 1_234_567) for layer in layers]
    lines = format_table(rows, steps=20_000).splitlines()
    assert lines[0] == "stabnorm: 48 layers worth a look in 20,000 steps"
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "and 40 more"
    assert sum("running_mean_distance" in line for line in lines) == 8
    assert len(set(line[:46] for line in lines if "1,234,567" in line)) == 8


def test_markdown_keeps_its_columns_and_puts_the_reasons_below() -> None:
    rows = [Row("a|norm", "max |x| jumped", "amax", 3.0, 7)] * 10
    lines = markdown_table(rows).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 8
    assert table[2] == r"| `a\|norm` | `amax` | 3 | 7 |"
    assert lines.count("* `a|norm`: max |x| jumped") == 8
    assert lines[-1] == "and 2 more"
