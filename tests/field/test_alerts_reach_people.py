"""An alert reaches whoever has to know: a function, other callbacks, the logger's own alert, a line of the terminal."""

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from tqdm import tqdm

from stabnorm import Alert, StabilityMonitor
from stabnorm.callbacks import StabilityCallback
from stabnorm.callbacks._terminal import LinesOfTheirOwn
from tests.callbacks.test_stability_outputs import LikeWandb
from tests.lightning_small import BATCHES, fit, module, trainer


def poisoned(at: int) -> Any:
    """A module whose norms see a NaN from a batch on."""
    model = module()
    loss = model.loss

    def with_nan(batch: dict[str, Tensor]) -> Tensor:
        after = len(model.losses) >= at
        value: Tensor = loss({**batch, "x": batch["x"] + float("nan") if after else batch["x"]})
        return value

    model.loss = with_nan
    return model


def test_a_function_is_called_with_each_alert() -> None:
    model, heard = nn.Sequential(nn.LayerNorm(8)), list[Alert]()
    with StabilityMonitor(model, ["amax"], flush_every=2, on_alert=heard.append) as monitor:
        for value in (1.0, float("nan"), 1.0):
            model(torch.randn(40, 8) * value)
            monitor.step()
    assert [(alert.step, alert.layer) for alert in heard] == [(1, "0")]
    assert heard == monitor.alerts


def test_a_function_that_raises_an_error_ends_no_training(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    def refuse(alert: Alert) -> None:
        raise OSError("the mail server is down")

    callback, model = StabilityCallback(["amax"], flush_every=2, on_alert=refuse), poisoned(4)
    fit(trainer(tmp_path, callback), model)
    assert len(model.losses) == BATCHES
    assert callback.monitor is not None
    assert callback.monitor.alerts
    assert caplog.text.count("on_alert raised an error, and the training goes on: OSError: the mail server") == 1


@pytest.mark.parametrize("wrong", [3, lambda: None])
def test_what_is_no_function_of_an_alert_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="on_alert="):
        StabilityCallback(on_alert=wrong)
    with pytest.raises(TypeError, match="on_alert="):
        StabilityMonitor(nn.LayerNorm(4), on_alert=wrong)


def test_early_stopping_ends_a_run_after_its_alert(tmp_path: Path) -> None:
    stopping = EarlyStopping(
        "stability/alerts", mode="min", stopping_threshold=-1, divergence_threshold=0.5, patience=99
    )
    model = poisoned(BATCHES + 3)
    run = trainer(tmp_path, StabilityCallback(["amax"], flush_every=4), stopping, max_epochs=5)
    fit(run, model)
    assert len(model.losses) == 2 * BATCHES
    assert float(run.callback_metrics["stability/alerts"]) >= 1


def test_early_stopping_knows_the_metrics_before_the_first_flush(tmp_path: Path) -> None:
    stopping = EarlyStopping("stability/worst_score", mode="min", patience=99, check_on_train_epoch_end=True)
    run = trainer(tmp_path, stopping, StabilityCallback(["amax"], flush_every=500), max_epochs=2)
    fit(run, model := module())
    assert len(model.losses) == 2 * BATCHES
    assert float(run.callback_metrics["stability/worst_score"]) == 0


def test_a_checkpoint_is_kept_of_the_steps_without_an_alert(tmp_path: Path) -> None:
    kept = ModelCheckpoint(
        tmp_path, "{step}", monitor="stability/alerts", mode="min", save_top_k=1, every_n_train_steps=2
    )
    callback = StabilityCallback(["amax"], flush_every=2)
    fit(trainer(tmp_path, callback, kept, enable_checkpointing=True), poisoned(6))
    assert kept.best_model_score is not None
    assert float(kept.best_model_score) == 0
    saved = torch.load(kept.best_model_path, weights_only=True)
    assert saved["global_step"] <= 6
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_a_logger_that_sends_alerts_is_asked_to(tmp_path: Path) -> None:
    sent: list[dict[str, str]] = []

    class Run:
        def alert(self, **alert: str) -> None:
            sent.append(alert)

    class Wandb(LikeWandb):
        experiment = Run()  # type: ignore[assignment]

    fit(trainer(tmp_path, StabilityCallback(["amax"], flush_every=2), logger=Wandb(tmp_path)), poisoned(4))
    assert len(sent) == 1
    assert "step 4" in sent[0]["title"]
    assert "net.1" in sent[0]["title"] + sent[0]["text"]


def test_a_message_does_not_stick_to_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    record = logging.LogRecord("stabnorm", logging.WARNING, "", 0, "step 3: a norm is off", None, None)
    with tqdm(total=5, file=terminal, mininterval=0, dynamic_ncols=False, ncols=40) as bar:
        bar.update(2)
        LinesOfTheirOwn().emit(record)
        bar.update(1)
    line = next(line for line in terminal.getvalue().split("\n") if "a norm is off" in line)
    assert line.split("\r")[-1] == "step 3: a norm is off"
