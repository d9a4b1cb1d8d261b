"""The table at the end blames no layer that did well, and says what its verdict rests on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback

from stabnorm.callbacks import ProgressiveNormCallback, StabilityCallback
from stabnorm.dashboard import format_table, markdown_table
from stabnorm.monitor.baseline import ARMED
from tests.lightning_padded import fit as fit_padded
from tests.lightning_padded import module as padded_module
from tests.lightning_small import BATCHES, fit, module, trainer


def test_layers_that_were_switched_are_not_blamed_for_the_gradients_of_a_norm_that_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    callback, switch = StabilityCallback("full"), ProgressiveNormCallback(schedule="linear")
    fit(trainer(tmp_path, callback, switch, max_epochs=4), module())
    assert callback.monitor is not None
    assert callback.monitor.history()["gradient_to_eps"][-1].tolist() == [0.0, 0.0]
    assert callback.monitor.fading.tolist() == [True, True]
    printed = caplog.text
    assert "2 of 2 layers switched" in capsys.readouterr().out
    assert "gradient_to_eps" not in printed


def test_a_layer_that_kept_its_norm_is_still_blamed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback, switch = StabilityCallback("full"), ProgressiveNormCallback(schedule=lambda step: float(step < BATCHES))
    model = module()
    model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1.0)

    class Early(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == BATCHES - 1

    fit(trainer(tmp_path, callback, switch, Early()), model)
    assert callback.monitor is not None
    assert callback.monitor.fading.tolist() == [False, False]
    assert caplog.text.count("gradient_to_eps") == 2


@pytest.mark.parametrize("epochs", [1, pytest.param(23, marks=pytest.mark.slow)])
def test_a_short_run_is_not_called_calm(tmp_path: Path, epochs: int, caplog: pytest.LogCaptureFixture) -> None:
    callback = StabilityCallback(["amax", "token_std_mean"])
    model = padded_module()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    fit_padded(trainer(tmp_path, callback, max_epochs=epochs), model)
    printed = " ".join(caplog.text.split())
    if epochs == 1:
        assert "nothing alarming was seen" not in printed
        assert (
            "no fixed bound was passed in 12 steps; layers are compared with their usual range only after 256 steps"
            in printed
        )
    else:
        assert f"nothing alarming was seen in {12 * epochs} steps" in printed
        assert 12 * epochs > ARMED


def test_a_resumed_run_has_the_past_of_the_one_before(tmp_path: Path) -> None:
    callback = StabilityCallback(["amax"])
    fit_padded(trainer(tmp_path, callback), padded_module())
    monitor = callback.monitor
    assert monitor is not None
    assert not monitor.compared
    state = monitor.state_dict()
    state["detector"]["fast"]["seen"].fill_(ARMED + 1)
    monitor.load_state_dict(state)
    assert monitor.compared


def test_the_verdict_in_markdown_rests_on_the_same() -> None:
    for text in (format_table([], steps=120, compared=False), markdown_table([], steps=120, compared=False)):
        assert "no fixed bound was passed in 120 steps" in " ".join(text.split())
    assert markdown_table([]) == "stabnorm: nothing alarming was seen"
