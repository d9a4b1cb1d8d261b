"""The demo as a new user runs it: the unstable run is noticed before its loss has doubled, the healthy one is not."""

from pathlib import Path

import pytest

from examples import demo


@pytest.mark.filterwarnings("ignore:.*:UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning")
def test_an_alert_comes_before_the_loss_has_doubled_and_none_on_the_healthy_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy, unstable = demo.main(["--root", str(tmp_path), "--no-progress"])
    assert healthy.alerts == []
    assert healthy.loss_doubled_at is None
    assert healthy.accuracy > 0.94
    assert unstable.loss_doubled_at is not None
    # It is written at the flush, every ten steps: that, too, must come before.
    assert demo.FAULT_AT < unstable.alerts[0].step + 10 < unstable.loss_doubled_at
    assert unstable.accuracy < 0.7
    printed = capsys.readouterr().out
    assert "stabnorm: nothing alarming was seen in 600 steps" in printed
    assert "monitoring cost" in printed
    assert f"tensorboard --logdir {tmp_path}" in printed
    assert {path.parts[-3] for path in tmp_path.rglob("events*")} == {"healthy", "unstable"}
