"""A verdict says what happened, where and when, in sentences that somebody else's run makes true as well."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from stabnorm.dashboard.runs import open_run
from stabnorm.dashboard.verdict import Verdict, verdict
from stabnorm.monitor.onsets import Onset
from tests.dashboard.records import LAYERS, alert, calm, file_record, growing


def judged(folder: Path) -> Verdict:
    run = open_run("run", folder)
    run.refresh()
    return verdict(run)


def test_a_calm_run_is_healthy_and_says_from_where_it_was_compared(tmp_path: Path) -> None:
    found = judged(file_record(tmp_path, calm(400)))
    assert (found.state, found.severity, found.onsets) == ("healthy", 0, ())
    assert "400 steps" in found.lines[0]
    assert "step 256" in found.lines[0]


@pytest.mark.parametrize("steps", [1, 12, 120, 255])
def test_a_run_that_still_learns_is_not_called_healthy(steps: int, tmp_path: Path) -> None:
    found = judged(file_record(tmp_path, calm(steps)))
    assert found.state == "too early"
    assert f"{steps} of 256 steps" in found.lines[0]


def test_an_empty_record_is_not_called_healthy(tmp_path: Path) -> None:
    assert judged(file_record(tmp_path, calm(0))).state == "too early"


def test_all_layers_at_once_mean_a_global_cause(tmp_path: Path) -> None:
    found = judged(file_record(tmp_path, growing(), events=[alert(315, LAYERS[1], value=1.6)]))
    (onset,) = found.onsets
    assert found.state == "unstable"
    assert found.title == "all 9 layers left their usual range at step 315"
    assert onset.moved == LAYERS
    assert "global" in onset.advice
    assert "learning rate" in onset.remedy


def test_calm_layers_before_the_first_one_place_the_cause(tmp_path: Path) -> None:
    folder = file_record(tmp_path, growing(first_layer=5), events=[alert(315, LAYERS[5])])
    (onset,) = judged(folder).onsets
    assert onset.moved == LAYERS[5:]
    assert judged(folder).title == f"{LAYERS[5]} and 3 more layers left their usual range at step 315"
    assert f"between {LAYERS[4]} and {LAYERS[5]}" in onset.advice
    assert "4 of 9 layers" in onset.sentence


def test_one_layer_alone_is_named(tmp_path: Path) -> None:
    scale = calm()
    scale[310:, 3] *= 2
    found = judged(file_record(tmp_path, scale, events=[alert(311, LAYERS[3], value=float(scale[311, 3]))]))
    assert found.title == f"{LAYERS[3]} left its usual range at step 311"
    assert f"Only {LAYERS[3]} moved" in found.onsets[0].advice
    assert "×2" in found.onsets[0].sentence


def test_alerts_close_to_each_other_are_one_onset(tmp_path: Path) -> None:
    events = [alert(300, "norm"), alert(360, LAYERS[0], "amax"), alert(455, "norm"), alert(700, "norm")]
    found = judged(file_record(tmp_path, calm(900), events=events))
    assert [(onset.step, onset.last_step, len(onset.alerts)) for onset in found.onsets] == [
        (300, 455, 3),
        (700, 700, 1),
    ]
    assert "2 onsets in all." in found.lines


@pytest.mark.parametrize(("doubles_at", "said"), [(350, "doubled 40 steps later"), (None, "did not double")])
def test_the_lead_on_the_loss_is_counted(doubles_at: int | None, said: str, tmp_path: Path) -> None:
    loss = np.ones(400)
    if doubles_at is not None:
        loss[doubles_at:] = 20.0  # the mean of five steps doubles with the first of them
    (onset,) = judged(file_record(tmp_path, growing(), loss=loss, events=[alert(310, "norm")])).onsets
    assert said in onset.sentence
    assert onset.lead == (None if doubles_at is None else 40)


def test_what_is_not_finite_is_said_first(tmp_path: Path) -> None:
    scale, loss = calm(), np.ones(400)
    scale[350:], loss[350:] = np.nan, np.nan
    events = [alert(349, "norm"), alert(350, LAYERS[0], "nonfinite", float("nan"))]
    found = judged(file_record(tmp_path, scale, loss=loss, events=events))
    assert (found.state, found.severity) == ("not finite", 3)
    assert found.title.startswith(f"NaN or infinity in {LAYERS[0]}")
    assert "The loss is not finite from step 350 on." in found.lines
    assert [onset.step for onset in found.onsets] == [349, 350]
    assert found.lines[0].startswith("It began at step 349: norm ")
    assert "batch" in found.onsets[1].advice


def test_a_loss_that_is_not_finite_needs_no_alert(tmp_path: Path) -> None:
    loss = np.ones(400)
    loss[380] = np.inf
    assert judged(file_record(tmp_path, calm(), loss=loss)).state == "not finite"


def test_a_switched_run_counts_its_norms_and_folds(tmp_path: Path) -> None:
    lam = np.repeat(np.clip(np.linspace(1.5, -1, 400), 0, 1)[:, None], len(LAYERS), 1)
    lam[:, 0] = 1.0
    norms = [{"name": name, "status": "forward", "into": "x", "reason": ""} for name in LAYERS[1:]]
    norms.append({"name": LAYERS[0], "status": "kept", "into": "", "reason": "it was held"})
    events = [("fold_report", 399, {"norms": norms})]
    found = judged(file_record(tmp_path, calm(), more={"lam": lam}, events=events))
    assert found.state == "switched"
    assert "8 of 9 norms are switched" in found.title
    assert any("8 of 9 norms are folded" in line for line in found.lines)


def test_a_run_whose_norms_are_on_their_way_is_not_called_switched(tmp_path: Path) -> None:
    lam = np.repeat(np.linspace(1, 0.2, 400)[:, None], len(LAYERS), 1)
    found = judged(file_record(tmp_path, calm(), more={"lam": lam}))
    assert (found.state, found.title) == ("switching", "0 of 9 norms are switched to BatchNorm")
    assert "is at most 0.2 now" in found.lines[0]


def test_a_name_of_300_letters_is_cut_in_sentences_and_whole_in_the_alert(tmp_path: Path) -> None:
    layers = tuple(f"{'a_long_name_' * 25}.{i}" for i in range(9))
    folder = file_record(tmp_path, growing(first_layer=5), layers=layers, events=[alert(315, layers[5])])
    found = judged(folder)
    (onset,) = found.onsets
    assert onset.layer == layers[5]
    assert all(layers[5] not in text for text in (found.title, *found.lines, onset.sentence, onset.advice))
    assert len(found.title) < 120


def test_an_alert_about_a_layer_that_the_record_lacks_is_still_told(tmp_path: Path) -> None:
    found = judged(file_record(tmp_path, calm(), events=[alert(300, "gone.norm")]))
    assert found.state == "unstable"
    assert "gone.norm" in found.title


def test_an_onset_that_the_monitor_wrote_is_told_in_its_words_and_in_its_last_version(tmp_path: Path) -> None:
    first = Onset(315, 315, "past", "one layer", LAYERS[5], "token_std_mean", 1.6, moved=LAYERS[5:6], sentence="Then.")
    grown = dataclasses.replace(first, scope="from here on", moved=LAYERS[5:], sentence="Since then.", advice="Look.")
    events = [alert(315, LAYERS[5]), *(("onset", 315, onset.as_dict()) for onset in (first, grown))]
    (onset,) = judged(file_record(tmp_path, growing(first_layer=5), events=events)).onsets
    assert (onset.scope, onset.layer, onset.moved, onset.advice) == ("from here on", LAYERS[5], LAYERS[5:], "Look.")
    assert onset.sentence.startswith("Since then. Their input scale was ×")
    assert [data["step"] for data in onset.alerts] == [315]


def test_a_statistic_with_a_published_remedy_names_it_as_what_to_try(tmp_path: Path) -> None:
    event = alert(311, LAYERS[3], statistic="attention_logit_max", value=2e4)
    (onset,) = judged(file_record(tmp_path, calm(), events=[event])).onsets
    assert "stabnorm.remedies.sigma_reparametrize gives each weight" in onset.remedy
    assert "Others are stabnorm.remedies.qk_norm, stabnorm.remedies.qk_clip." in onset.remedy
    assert onset.remedy.endswith("See stabnorm remedies attention_logit_max.")


def test_an_alert_says_which_rows_of_the_batch_did_it(tmp_path: Path) -> None:
    rows = ("rows", 312, {"sentence": "Row 4 of 6 did it."}), ("rows", 20, {"sentence": "Row 1 of 6 did it."})
    alerts = [alert(311, LAYERS[3]), alert(312, LAYERS[3])]
    (onset,) = judged(file_record(tmp_path, growing(first_layer=3), events=[*alerts, *rows])).onsets
    assert onset.advice.endswith("Row 4 of 6 did it.")
    assert "Row 1" not in onset.advice
