"""What a user finds by typing: objects that say what they are, the command, its version."""

import subprocess
import sys

import pytest
from torch import nn

import stabnorm
from stabnorm.callbacks import FoldCallback, ProgressiveNormCallback, StabilityCallback
from stabnorm.cli import main
from tests.field.odd_inputs import X, converted, plain


def test_a_monitor_says_what_it_watches_and_how_far_it_is() -> None:
    model = nn.Sequential(plain(), nn.LayerNorm(2))
    with stabnorm.StabilityMonitor(model, ["amax"], companions=["weights"]) as monitor:
        model(X)
        monitor.step()
        assert repr(monitor) == (
            "StabilityMonitor(2 layers, 1 statistics, weights: 2 rows, flush_every=50: "
            "1 steps done, 0 alerts, hooks on)"
        )
    assert repr(monitor).endswith("hooks off)")


def test_a_switch_says_how_far_it_is() -> None:
    switch = stabnorm.ProgressiveSwitch(converted(), 10, "linear")
    switch.step(8)
    assert repr(switch) == "ProgressiveSwitch(1 layers, schedule='linear': step 8 of 10, 1 switched)"


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (StabilityCallback(), "StabilityCallback()"),
        (StabilityCallback("full", mask="valid"), "StabilityCallback(preset='full', mask='valid')"),
        (ProgressiveNormCallback(), "ProgressiveNormCallback()"),
        (
            ProgressiveNormCallback(schedule="linear", start=3, mask=1, norm_options={"eps": 0.1}),
            "ProgressiveNormCallback(schedule='linear', start=3, mask=1, norm_options={'eps': 0.1})",
        ),
        (FoldCallback(), "FoldCallback()"),
        (FoldCallback("net", options={"strict": True}), "FoldCallback(module='net', options={'strict': True})"),
    ],
)
def test_a_callback_is_shown_as_the_call_that_builds_it(callback: object, said: str) -> None:
    assert repr(callback) == said


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"stabnorm {stabnorm.__version__}\n"


def test_the_package_runs_as_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "stabnorm", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout == f"stabnorm {stabnorm.__version__}\n"
    ran = subprocess.run([sys.executable, "-m", "stabnorm"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("usage: stabnorm ")
