"""The demo as a new user runs it: what is unstable is noticed, what is healthy is not, and the switch costs nothing."""

from pathlib import Path

import pytest

from stabnorm.examples import demo
from stabnorm.nn import PRepBN

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:.*:UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning")
def test_an_alert_comes_before_the_loss_has_doubled_and_none_on_the_healthy_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    healthy, unstable, switched = demo.main(["--root", str(tmp_path), "--no-progress"])
    assert healthy.alerts == []
    assert healthy.loss_doubled_at is None
    assert healthy.accuracy > 0.94
    assert unstable.loss_doubled_at is not None
    # It is written at the flush, every ten steps: that, too, must come before.
    assert demo.FAULT_AT < unstable.alerts[0].step + 10 < unstable.loss_doubled_at
    assert unstable.accuracy < 0.9
    # It names the block that breaks: the first norm that reads what this block writes.
    assert unstable.onsets[0].scope == "from here on"
    assert "between blocks.1.norm" in unstable.onsets[0].advice
    assert healthy.onsets == switched.onsets == []
    assert switched.alerts == []
    assert switched.accuracy > healthy.accuracy - 0.01
    assert all(norm.lam == 0 for norm in switched.model.modules() if isinstance(norm, PRepBN))
    assert sum(isinstance(norm, PRepBN) for norm in switched.model.modules()) == 9
    printed = capsys.readouterr().out
    assert "stabnorm: nothing alarming was seen in 600 steps" in caplog.text
    assert "monitoring cost" in caplog.text
    assert "what broke: Since step 3" in printed
    assert "9 of 9 norms are affine now" in printed
    assert "9 norms: 9 forward" in printed
    assert f"folded: 0 norms left, accuracy {100 * switched.accuracy:.1f} %" in printed
    assert len(list(tmp_path.glob("switched/*/stabnorm_logs/folded*"))) == 3
    assert f"tensorboard --logdir {tmp_path}" in printed
    assert {path.parts[-3] for path in tmp_path.rglob("*tfevents*")} == {"healthy", "unstable", "switched"}
