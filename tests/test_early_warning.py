"""The early-warning benchmark: its oracle, the rules of others, and that it repeats and interrupts no run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import early_warning
from benchmarks.broken_runs import STATISTICS, Length, Outcome, Study
from benchmarks.faulty_trainings import FAMILIES, FAULTS, Training, constant, warmed_up
from benchmarks.judged_runs import AMAX, HOT, refused_steps, visible_divergence
from benchmarks.peer_rules import above_median, above_past, events, olmo_core, spike_detection, zclip

CALM = 1 + 0.05 * np.sin(np.arange(300))


def test_a_training_diverges_visibly_where_five_losses_one_loss_or_a_nan_say_so() -> None:
    assert visible_divergence(CALM, 200) is None
    slow, single, undefined = CALM.copy(), CALM.copy(), CALM.copy()
    slow[250:] += 0.4
    single[230] = 2.5
    undefined[221] = math.nan
    assert visible_divergence(slow, 200) == 248  # of its five losses three are high
    assert visible_divergence(single, 200) == 230
    assert visible_divergence(undefined, 200) == 221
    assert visible_divergence(single, 240) is None


def test_steps_are_refused_that_are_far_above_their_past_or_not_finite_and_a_new_level_is_accepted() -> None:
    run = Outcome("any", "any", 0, losses=[1.0] * 320, gradients=[1.0] * 320, rows={"": ("norm",)})
    run.values[""] = torch.ones(320, 1, len(STATISTICS[""]))
    run.values[""][260, 0, AMAX] = 5.0
    run.gradients[262] = math.inf
    run.losses[270:] = [9.0] * 50
    assert list(refused_steps(run)) == [260, 262, *range(270, 275)]


def test_a_rule_alarms_at_a_jump_and_counts_one_event_once() -> None:
    series = CALM.copy()
    series[200:204] = 5.0
    series[290] = 50.0
    for rule in (spike_detection, olmo_core, above_median, zclip):
        assert list(rule(CALM)) == [] or rule is zclip
        assert 200 in list(rule(series)), rule.__name__
    assert events(above_median(series)) == [200]
    assert events([200, 290, 380, 481]) == [200, 481]  # what goes on is one event, however long it is
    assert 200 not in list(zclip(CALM))
    late = np.r_[CALM, CALM, CALM]
    late[700:704] = 5.0
    late[800] = math.nan
    assert events(above_past(late)) == [700]
    late[820] = math.nan
    assert list(above_past(late))[-2:] == [800, 820]


def test_zclip_is_silent_for_ever_after_a_norm_that_is_not_finite() -> None:
    series = np.r_[CALM, CALM]
    series[290], series[400] = math.nan, 1000.0
    assert 400 not in list(zclip(series))


def test_lightnings_rule_is_the_one_of_its_class() -> None:
    spikes: Any = pytest.importorskip("lightning_fabric.utilities.spike")

    class Fabric:
        class strategy:
            root_device = torch.device("cpu")
            barrier = staticmethod(lambda: None)
            reduce_boolean_decision = staticmethod(lambda decision, all: decision)

    class Quiet(spikes.SpikeDetection):  # type: ignore[misc]
        def _handle_spike(self, fabric: Any, batch_idx: int) -> None:
            self.bad_batches.append(batch_idx)

    torch.manual_seed(0)
    series = torch.randn(300).abs()
    series[120] = math.nan
    theirs = Quiet()
    for step, loss in enumerate(series):
        theirs.on_train_batch_end(Fabric(), loss, None, step)
    assert list(spike_detection(series.double().numpy())) == theirs.bad_batches
    assert len(theirs.bad_batches) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_that_is_saved_and_loaded_goes_on_with_the_same_losses(family: str) -> None:
    whole = Training(FAMILIES[family], 10, depth=3, dropout=0.1, schedule=warmed_up(constant))
    for _ in range(3):
        whole.train_step()
    state = whole.state_dict()
    wanted = [float(whole.train_step()[0]) for _ in range(3)]
    again = Training(FAMILIES[family], 11, depth=3, dropout=0.1, schedule=warmed_up(constant))
    again.load_state_dict(state)
    assert [float(again.train_step()[0]) for _ in range(3)] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_the_losses_and_no_fault_does_not(name: str) -> None:
    def losses(fault: str) -> list[float]:
        training = Training(FAMILIES["digits Pre-LN"], 10, depth=3, schedule=warmed_up(constant, 1))
        training.train_step()
        found = []
        for since in range(3):
            FAULTS[fault].apply(training, since)
            found.append(float(training.train_step()[0]))
        return found

    assert (losses(name) == pytest.approx(losses("nothing"), rel=1e-6)) is (name == "nothing")


@pytest.mark.slow
def test_a_quick_study_prints_its_tables_and_repeats_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["--kinds", "one infinity", "fc2 x1.02 a step", "nothing", "calm: restarts", HOT]
    few = ["--quick", "--seeds", "10", "--families", "characters", "--folder", str(tmp_path), *chosen]
    early_warning.main(few)
    printed = capsys.readouterr().out
    assert "| one infinity | 1 | 1 | 1 | 1 | 0 | 0 | 0 | - (0) | 1 of 1 | 1 of 1 |" in printed
    assert "| one infinity | 1 | 1 | 1 | 1 | 1 | 1 | 0 | 0 |" in printed
    assert "| Lightning SpikeDetection | 0 of 1 |" in printed
    monkeypatch.setattr(Training, "train_step", None)  # nothing is trained again
    early_warning.main(few)
    assert capsys.readouterr().out == printed

    def cut(run: Outcome) -> Path:
        path = Study(tmp_path, Length()).path(run)
        path.write_bytes(path.read_bytes()[:100])
        return path

    run = Outcome("one infinity", "characters", 10)
    cut(run)
    assert Study(tmp_path, Length()).read(run) is None
