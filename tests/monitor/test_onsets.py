"""Alerts that belong together are one onset; it names a layer only where one began it."""

import numpy as np
import pytest

from stabnorm.monitor.alerts import Alert, Departure
from stabnorm.monitor.onsets import Onset, OnsetFollower, Watched
from stabnorm.monitor.record import Block

LAYERS = tuple(f"norm{i}" for i in range(9))
WATCHED = Watched(LAYERS, steps=450)


def alert(layer: str, step: int = 400, statistic: str = "token_std_mean", **more: object) -> Alert:
    return Alert(step, layer, statistic, 3.0, 1.5, "because", usual=1.0, score=9.0, **more)  # type: ignore[arg-type]


def left(layer: str, step: int = 400, *, gradient: bool = False) -> Departure:
    return Departure(step, layer, "grad_gain" if gradient else "token_std_mean", 3.0, 1.0, 9.0, gradient)


def followed(first: Alert, departures: list[Departure], follower: OnsetFollower | None = None) -> Onset:
    (onset,) = (follower or OnsetFollower()).add([first], departures, WATCHED)
    return onset


def test_one_layer_that_moves_alone_is_named_with_its_neighbours_and_on_what_this_rests() -> None:
    onset = followed(alert("norm3"), [left("norm3")])
    assert (onset.scope, onset.layer, onset.moved) == ("one layer", "norm3", ("norm3",))
    assert "between norm2 and norm3" in onset.advice
    assert "×3 its usual 1; that is 9 robust standard deviations, and alerts begin at 6" in onset.sentence
    assert onset.rests_on == "450 steps watched, compared with the past from the 256th on."
    assert "checkpoint before step 400" in onset.remedy


def test_what_moves_behind_a_layer_follows_from_it() -> None:
    onset = followed(alert("norm5"), [left(name, 400 + i) for i, name in enumerate(LAYERS[5:])])
    assert (onset.scope, onset.layer, onset.moved) == ("from here on", "norm5", LAYERS[5:])


def test_a_break_before_the_third_layer_is_not_global_though_most_layers_move() -> None:
    onset = followed(alert("norm2"), [left(name) for name in LAYERS[2:]])
    assert (onset.scope, onset.layer) == ("from here on", "norm2")


def test_of_layers_that_a_fault_reaches_together_the_first_one_is_named_and_no_stray_one_before_them() -> None:
    behind = [left(name, 400 + 3 * (name == "norm4")) for name in LAYERS[4:]]
    onset = followed(alert("norm6"), [left("norm0"), *behind])
    assert (onset.scope, onset.layer) == ("from here on", "norm4")
    assert "between norm3 and norm4" in onset.advice


def test_what_happens_long_after_an_onset_does_not_change_its_story() -> None:
    follower = OnsetFollower()
    told = followed(alert("norm5"), [left(name) for name in LAYERS[5:]], follower)
    assert follower.add([], [left("norm1", 900)], WATCHED) == []
    assert follower.onsets == [told]


def test_an_update_that_a_rising_learning_rate_explains_accuses_no_matrix() -> None:
    first = alert("w0", statistic="update_excess", companion="weights")
    departure = left("w0")._replace(companion="weights", statistic="update_excess")
    watched = Watched(LAYERS, {"weights": 8}, 450)
    follower = OnsetFollower()
    rates = 1e-3 * 1.03 ** np.arange(450).clip(380).astype(np.float32)
    follower.settings.see(Block(0, LAYERS, {"learning_rate": rates}))
    (onset,) = follower.add([first], [departure], watched)
    assert (onset.scope, onset.cause) == ("everywhere", "learning rate")
    follower = OnsetFollower()
    follower.settings.see(Block(0, LAYERS, {"learning_rate": np.full(450, 1e-3, np.float32)}))
    (onset,) = follower.add([first], [departure], watched)
    assert (onset.scope, onset.layer) == ("one layer", "w0")


def test_a_loss_and_gradients_that_leave_their_range_while_no_input_does_accuse_no_layer() -> None:
    first = alert("norm8", statistic="grad_gain")
    loss = left("training", 401)._replace(statistic="loss")
    gradients = [left(name, gradient=True) for name in LAYERS[3:]]
    onset = followed(first, [*gradients, loss, left("norm4", 412)])  # inputs follow when the weights have moved
    assert onset.scope == "training"
    assert "and no layer's input did" in onset.sentence
    assert "targets" in onset.advice
    follower = OnsetFollower()
    assert followed(first, gradients, follower).scope == "from here on"
    (onset,) = follower.add([], [loss], WATCHED)  # the monitor's series of the loss follow those of its layers
    assert onset.scope == "training"
    assert followed(first, [*gradients, loss, left("norm4", 401)]).layer == "norm4"


def test_gradients_are_read_in_reverse_depth_order() -> None:
    first = alert("norm4", statistic="grad_gain")
    onset = followed(first, [left(name, gradient=True) for name in LAYERS[1:5]])
    assert (onset.scope, onset.layer) == ("from here on", "norm4")
    assert "reverse depth order" in onset.sentence
    assert "between norm4 and norm5" in onset.advice


def test_nearly_all_layers_at_once_blame_none_and_say_which_setting_moved() -> None:
    follower = OnsetFollower()
    rates = np.where(np.arange(450) < 390, 1e-3, 4e-3).astype(np.float32)
    follower.settings.see(Block(0, LAYERS, {"learning_rate": rates}))
    onset = followed(alert("norm1"), [left(name, 400 + i % 2) for i, name in enumerate(LAYERS[1:])], follower)
    assert (onset.scope, onset.cause) == ("everywhere", "learning rate")
    assert "from 0.001 to 0.004" in onset.advice
    assert "norm1 " not in onset.advice
    assert "lower learning rate" in onset.remedy
    unknown = followed(alert("norm0"), [left(name) for name in LAYERS])
    assert (unknown.scope, unknown.cause) == ("everywhere", "")


@pytest.mark.parametrize(
    ("name", "before", "after", "cause"),
    [("weight_decay", 0.01, -0.01, "weight decay"), ("loss_scale", 65536.0, 8192.0, "precision")],
)
def test_weight_decay_and_precision_are_causes_too(name: str, before: float, after: float, cause: str) -> None:
    follower = OnsetFollower()
    values = np.where(np.arange(450) < 395, before, after).astype(np.float32)
    follower.settings.see(Block(0, LAYERS, {name: values}))
    assert followed(alert("norm0"), [left(layer) for layer in LAYERS], follower).cause == cause


def test_an_onset_grows_with_later_flushes_and_a_calm_stretch_ends_it() -> None:
    follower = OnsetFollower()
    followed(alert("norm5"), [left("norm5")], follower)
    (grown,) = follower.add([], [left("norm6", 420)], WATCHED)
    assert grown.moved == ("norm5", "norm6")
    assert grown.scope == "from here on"
    assert follower.add([], [left("norm7", 460)], WATCHED) == []  # more than 32 steps later
    (other,) = follower.add([alert("norm1", 700)], [left("norm1", 700)], WATCHED)
    assert other.layer == "norm1"
    assert [onset.step for onset in follower.onsets] == [400, 700]


def test_nan_is_an_onset_of_its_own() -> None:
    follower = OnsetFollower()
    followed(alert("norm5"), [left("norm5")], follower)
    onset = followed(Alert(403, "norm2", "nonfinite", float("nan"), 0.0, "", "nonfinite"), [], follower)
    assert (onset.kind, onset.layer) == ("nonfinite", "norm2")
    assert len(follower.onsets) == 2


def test_most_matrices_of_a_companion_at_once_are_global_too() -> None:
    rows = [f"w{i}" for i in range(8)]
    departures = [left(name)._replace(companion="weights", statistic="update_ratio") for name in rows]
    first = alert("w0", statistic="update_ratio", companion="weights")
    (onset,) = OnsetFollower().add([first], departures, Watched(LAYERS, {"weights": 8}, 450))
    assert onset.scope == "everywhere"
    (onset,) = OnsetFollower().add([first], departures[:1], Watched(LAYERS, {"weights": 8}, 450))
    assert (onset.scope, onset.layer) == ("one layer", "w0")


def test_an_onset_survives_the_way_through_a_record() -> None:
    onset = followed(alert("norm3"), [left("norm3")])
    assert Onset.of_dict(onset.as_dict()) == onset
