"""The study runs, resumes and judges as it says; in the example a run breaks, and the remedy that it names cures it."""

import math
from pathlib import Path

import pytest

from benchmarks import remedies
from benchmarks.remedy_cases import CASES, NONE
from stabnorm.examples import remedy
from stabnorm.remedies.symptoms import REMEDIES


@pytest.mark.slow
def test_the_quick_study_of_a_case_prints_a_row_for_each_remedy_and_repeats_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--quick", "--cases", "logits", "embedding", "--out", str(tmp_path / "runs.jsonl")]
    remedies.main(few)
    remedies.main(few)
    runs = remedies.read(tmp_path / "runs.jsonl")
    assert len(runs) == 7
    assert all(run.named for run in runs)
    out = capsys.readouterr().out
    for name in ("sigma_reparametrize", "qk_norm", "qk_clip", "stable_embedding", "freeze_embedding"):
        assert f"`{name}`" in out


@pytest.mark.parametrize(
    ("value", "loss", "said"),
    [
        (90.0, 2.5, "cured, loss better"),
        (90.0, 3.01, "cured, loss no worse"),
        (150.0, 3.1, "helped, loss worse"),
        (990.0, 3.0, "did not help, loss no worse"),
        (float("nan"), 3.0, "nothing left to measure, loss no worse"),
        (90.0, float("nan"), "cured, loss not finite"),
    ],
)
def test_the_verdict_follows_the_bound_and_the_loss(value: float, loss: float, said: str) -> None:
    assert remedies.verdict(CASES["logits"], value, loss, (1000.0, 3.0)) == said


def test_where_no_statistic_shows_it_the_loss_alone_is_judged() -> None:
    nothing = float("nan")
    assert remedies.verdict(CASES["positions"], nothing, 2.5, (nothing, 3.0)) == "loss better"


def test_every_arm_but_the_baselines_is_a_remedy_of_the_table() -> None:
    known = {remedy.name.rpartition(".")[2].removesuffix("Callback") for remedy in REMEDIES} | {
        "GroupNorm",
        "statistics",
    }
    for case in CASES.values():
        for arm in case.remedies:
            assert arm.split()[0].removesuffix(",") in known, arm


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name not in ("logits", "depth", "embedding")])
def test_every_case_runs_with_each_of_its_remedies(case: str) -> None:
    for arm in (NONE, *CASES[case].remedies):
        outcome = remedies.run(remedies.Outcome(case, arm, seed=0, steps=3))
        assert math.isfinite(outcome.loss), arm


def test_without_a_bound_half_the_statistic_cures() -> None:
    case = CASES["depth"]
    assert remedies.verdict(case, 0.49, 3.0, (1.0, 3.0)) == "cured, loss no worse"
    assert remedies.verdict(case, 0.6, 3.0, (1.0, 3.0)) == "helped, loss no worse"


@pytest.mark.slow
def test_the_run_breaks_its_alert_names_the_remedy_and_with_it_the_same_seed_trains(
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken, cured = remedy.main(["--steps", "40", "--learning-rate", "0.2"])
    assert any("stabnorm.remedies.sigma_reparametrize" in alert.reason for alert in broken.alerts)
    assert not any(alert.statistic == "attention_logit_max" for alert in cured.alerts)
    assert broken.logit > 1e4 > 1e3 > cured.logit
    assert cured.loss < broken.loss - 0.2
    assert "apply stabnorm.remedies.sigma_reparametrize" in capsys.readouterr().out
