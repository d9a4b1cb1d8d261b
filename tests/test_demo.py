"""What the demo shows: what is unstable is noticed before the loss tells, and the switch costs nothing."""

from pathlib import Path

import pytest

from stabnorm import find_norms
from stabnorm.callbacks import FoldCallback, ProgressiveNormCallback
from stabnorm.examples import demo
from stabnorm.examples.digits import Destabilize
from stabnorm.nn import PRepBN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*:UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning"),
]
HEALTHY = 0.966  # accuracy of the healthy run, which takes as long as the other two and so is not repeated here


def test_the_alert_names_the_broken_block_before_the_loss_has_doubled_and_none_comes_before_the_fault(
    tmp_path: Path,
) -> None:
    fault = Destabilize(demo.BROKEN, demo.FAULT_AT, demo.GROWTH)
    unstable = demo.watch("unstable", str(tmp_path), fault, progress=False)
    assert unstable.loss_doubled_at is not None
    # It is written at the flush, every ten steps: that, too, must come before.
    assert demo.FAULT_AT < unstable.alerts[0].step + 10 < unstable.loss_doubled_at
    assert unstable.accuracy < 0.9
    # It names the block that breaks: the first norm that reads what this block writes.
    assert unstable.onsets[0].scope == "from here on"
    assert "between blocks.1.norm" in unstable.onsets[0].advice
    assert unstable.dumps


def test_the_switched_run_is_as_accurate_as_the_healthy_one_raises_no_alert_and_folds_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fold = FoldCallback()
    switched = demo.watch("switched", str(tmp_path), ProgressiveNormCallback(), fold, progress=False)
    assert switched.alerts == []
    assert switched.onsets == []
    assert switched.loss_doubled_at is None
    assert switched.accuracy > HEALTHY - 0.01
    norms = [module for module in switched.model.modules() if isinstance(module, PRepBN)]
    assert len(norms) == 9
    assert all(norm.lam == 0 for norm in norms)
    assert fold.result is not None
    assert len(find_norms(fold.result.model)) == 0
    assert demo.accuracy(fold.result.model) == pytest.approx(switched.accuracy, abs=1e-6)
    assert len(list(tmp_path.glob("switched/*/stabnorm_logs/folded*"))) == 3
    assert "stabnorm: nothing alarming was seen in 600 steps" in caplog.text
    assert "monitoring cost" in caplog.text


def test_all_three_runs_are_trained_and_what_there_was_to_see_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "STEPS", 30)
    healthy, _, switched = demo.main(["--root", str(tmp_path), "--no-progress"])
    printed = capsys.readouterr().out
    assert (
        f"accuracy with LayerNorm {100 * healthy.accuracy:.1f} %, switched {100 * switched.accuracy:.1f} %" in printed
    )
    assert "of 9 norms are affine now" in printed
    assert "norms left, accuracy" in printed
    assert f"tensorboard --logdir {tmp_path}" in printed
    assert {path.parts[-3] for path in tmp_path.rglob("*tfevents*")} == {"healthy", "unstable", "switched"}
