"""The loss and the norm of the gradient are watched as the layers are, and announced changes raise nothing."""

import math
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from stabnorm import StabilityMonitor
from stabnorm.callbacks import StabilityCallback
from stabnorm.monitor.record import Block
from tests.lightning_small import fit, module, trainer


def watch(losses: list[float], norms: list[float] | None = None, flush_every: int = 50) -> StabilityMonitor:
    model = nn.Sequential(nn.LayerNorm(4))
    monitor = StabilityMonitor(model, ["token_mean_mean"], gradients=False, flush_every=flush_every)
    with monitor:
        for step, loss in enumerate(losses):
            monitor.step(loss=loss, gradient_norm=None if norms is None else norms[step])
    return monitor


def test_a_loss_that_triples_is_an_alert_of_the_training_and_blames_no_layer() -> None:
    monitor = watch([1.0] * 270 + [3.0] * 5)
    (alert,) = monitor.alerts
    (onset,) = monitor.onsets
    assert (alert.step, alert.layer, alert.statistic) == (271, "training", "loss")
    assert onset.scope == "training"
    assert onset.moved == ()
    assert "no layer has left its usual range" in onset.sentence


def test_a_gradient_norm_that_jumps_is_one_and_a_fall_is_none() -> None:
    monitor = watch([1.0] * 290, [1.0] * 260 + [1e-3] * 5 + [1.0] * 20 + [9.0] * 5)
    assert [(alert.step, alert.statistic) for alert in monitor.alerts] == [(285, "gradient_norm")]


def test_a_loss_of_nan_is_an_event_from_the_first_step_on_and_a_loss_that_was_not_given_is_none() -> None:
    assert watch([math.nan]).alerts[0].statistic == "nonfinite"
    monitor = watch([1.0, math.inf, 1.0])
    assert [(alert.step, alert.kind) for alert in monitor.alerts] == [(1, "nonfinite")]
    model = nn.Sequential(nn.LayerNorm(4))
    with StabilityMonitor(model, ["amax"]) as silent:
        for step in range(4):
            silent.step(loss=1.0 if step % 2 else None)
    assert silent.alerts == []


def test_saved_in_the_middle_of_a_flush_a_run_goes_on_to_the_same_alerts() -> None:
    losses = [1.0] * 280 + [1.0 + 0.9 * step for step in range(20)]
    whole = watch(losses, flush_every=7)
    first = watch(losses[:285], flush_every=1000)
    model = nn.Sequential(nn.LayerNorm(4))
    second = StabilityMonitor(model, ["token_mean_mean"], gradients=False, flush_every=7)
    with StabilityMonitor(model, ["token_mean_mean"], gradients=False, flush_every=1000) as interrupted:
        for loss in losses[:285]:
            interrupted.step(loss=loss)
        second.load_state_dict(interrupted.state_dict())
    with second:
        for loss in losses[285:]:
            second.step(loss=loss)
    assert first.alerts == whole.alerts[: len(first.alerts)]
    assert second.alerts == whole.alerts
    assert whole.alerts


def test_an_announced_change_raises_nothing_and_is_in_the_record() -> None:
    class Events(list[tuple[str, int]]):
        def write_block(self, block: Block) -> None: ...

        def write_event(self, kind: str, step: int, data: object) -> None:
            self.append((kind, step))

        def close(self) -> None: ...

    model, events = nn.Sequential(nn.LayerNorm(4)), Events()
    monitor = StabilityMonitor(model, ["amax"], gradients=False)
    monitor.records.append(events)
    with monitor:
        for step in range(400):
            if step == 300:
                monitor.announce_change("batch size 256")
            model(torch.ones(40, 4) * (5 if step >= 300 else 1))
            monitor.step(loss=3.0 if step >= 300 else 1.0)
    assert monitor.alerts == []
    assert events == [("announced", 300)]
    with pytest.raises(TypeError, match="reason"):
        monitor.announce_change(3)  # type: ignore[arg-type]


def test_the_callback_gives_the_norm_of_the_gradient_before_it_is_clipped(tmp_path: Path) -> None:
    callback, norms = StabilityCallback(["amax"], flush_every=1), list[float]()

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    recorded = list[float]()

    class Record:
        def write_block(self, block: Block) -> None:
            recorded.extend(block.series["gradient_norm"].tolist())

        def write_event(self, kind: str, step: int, data: object) -> None: ...

        def close(self) -> None: ...

    class Attach(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert callback.monitor is not None
            callback.monitor.records.append(Record())

    fit(trainer(tmp_path, callback, Norms(), Attach(), max_epochs=1, gradient_clip_val=1e-3), module())
    assert recorded == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 1e-3


def test_the_callback_announces_that_gradients_accumulate_over_more_batches(tmp_path: Path) -> None:
    callback, said = StabilityCallback(["amax"]), list[str]()

    class Change(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert callback.monitor is not None
            vars(callback.monitor)["announce_change"] = said.append
            trainer.accumulate_grad_batches = 2

    fit(trainer(tmp_path, callback, Change(), max_epochs=3), module())
    assert said == ["gradients accumulate over 2 batches instead of 1"]
