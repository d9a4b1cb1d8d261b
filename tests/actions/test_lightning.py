"""Actions in a Trainer: a skipped step leaves everything as it was, and each action reaches the Trainer."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from stabnorm import StabNormError
from stabnorm.actions import Rollback, Skip
from stabnorm.callbacks import ProgressiveNormCallback, StabilityCallback
from stabnorm.monitor import read_record
from tests.actions.nets import batches, everything, net, same, with_a_past
from tests.actions.test_plain_loop import AlarmAt
from tests.lightning_small import fit as fit_small
from tests.lightning_small import module, trainer

STEPS = 8


class Module(pl.LightningModule):
    """Trains with automatic optimization, and keeps what there is after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.states: list[dict[str, Tensor]] = []
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch).square().mean()
        self.seen.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)}

    def on_train_batch_end(self, *_: Any) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        state = everything(self, *self.trainer.optimizers)
        if scaler is not None:
            state |= {name: torch.as_tensor(value) for name, value in scaler.state_dict().items()}
        self.states.append(state)


class TwoOptimizers(Module):
    """Steps two optimizers in each batch by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch).square().mean()
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        first, second = self.net[:3].parameters(), self.net[3:].parameters()
        return [torch.optim.AdamW(first, lr=0.01), torch.optim.SGD(second, lr=0.01, momentum=0.9)]


def loader(data: list[Tensor]) -> DataLoader[Tensor]:
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def fit(callback: StabilityCallback, model: Any, data: list[Tensor], tmp_path: Path, *more: Any, **options: Any) -> Any:
    run = trainer(tmp_path, callback, *more, num_sanity_val_steps=0, log_every_n_steps=1, **options)
    run.fit(model, loader(data))
    return run


def skipping(kind: str = "non_finite", **options: Any) -> StabilityCallback:
    return StabilityCallback(["amax", "grad_gain"], flush_every=4, actions={kind: "skip"}, **options)


class Remembering(Callback):
    """Gives the monitor a past."""

    def __init__(self, callback: StabilityCallback) -> None:
        self.callback = callback

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert self.callback.monitor is not None
        with_a_past(self.callback.monitor, trainer.optimizers)


@pytest.mark.parametrize("kind", ["non_finite", "spike"])
@pytest.mark.parametrize("case", ["plain", "clipping", "accumulation", "bf16", "scaler", "two optimizers"])
def test_a_skipped_step_leaves_everything_bit_identical(case: str, kind: str, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "clipping": {"gradient_clip_val": 0.5},
        "accumulation": {"accumulate_grad_batches": 2},
        "bf16": {"precision": "bf16-mixed"},
        "scaler": {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]},
    }
    model = TwoOptimizers() if case == "two optimizers" else Module()
    callback, data = skipping(kind), batches(STEPS)
    data[4] = 1000 * data[4] if kind == "spike" else torch.full_like(data[4], torch.nan)
    fit(callback, model, data, tmp_path, Remembering(callback), **cases.get(case, {}))
    before, after = (3, 5) if case == "accumulation" else (3, 4)
    assert same(model.states[before], model.states[after])
    assert not same(model.states[after], model.states[-1])
    assert all(torch.isfinite(value.float()).all() for value in model.states[-1].values())
    assert callback.responses is not None
    (done,) = callback.responses.done
    assert (done.why.kind, done.why.layer, done.why.step) == (kind, "net.1", 2 if case == "accumulation" else 4)
    if case == "scaler":
        assert model.states[-1]["scale"] == 8


def test_a_loss_scale_that_is_too_large_is_the_scalers_own_matter(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)  # gradients overflow in half precision
    callback = skipping()
    fit(callback, Module(), batches(STEPS), tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert callback.responses is not None
    assert not callback.responses.done
    assert scaler.get_scale() < 2.0**30


def test_the_record_and_the_log_say_what_was_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = skipping()
    fit(callback, Module(), batches(STEPS, spoilt=[4]), tmp_path)
    assert callback.directory is not None
    (event,) = [event for event in read_record(callback.directory).events if event.kind == "action"]
    assert event.step == 4
    assert event.data["action"] == "skip"
    assert "the norm 'net.1' is not finite" in event.data["reason"]
    assert "step 4: the step is left out (1 of 10 in 100 steps), because of non_finite" in caplog.text


def test_a_used_up_budget_ends_the_fit_with_the_reason(tmp_path: Path) -> None:
    callback = StabilityCallback(["amax"], actions={"non_finite": Skip(budget=2)})
    model = Module()
    with pytest.raises(StabNormError, match=r"3 of the last 100 steps .* the norm 'net\.1'"):
        fit(callback, model, batches(STEPS, spoilt=range(3, STEPS)), tmp_path)
    assert same(model.states[2], everything(model, *model.trainer.optimizers))


def test_an_alarm_saves_a_checkpoint_reduces_the_rate_and_stops(tmp_path: Path) -> None:
    actions = {"one_layer": ["checkpoint", "reduce_lr", "stop"]}
    callback = StabilityCallback(["amax"], flush_every=5, detector=AlarmAt, actions=actions)
    model = Module()
    run = fit(callback, model, batches(20), tmp_path)
    assert len(model.seen) == 10
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)
    assert callback.directory is not None
    saved = torch.load(callback.directory / "alarms" / "step10-one_layer.ckpt", weights_only=True)
    assert saved["global_step"] == 10


def test_a_rollback_leaves_the_bad_data_out_and_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    data, losses = batches(20), []
    for detector, seen in ((AlarmAt, data), (None, data[:4] + data[10:])):
        rollback = Rollback(every=4, before=2)
        callback = StabilityCallback(["amax"], flush_every=5, detector=detector, actions={"one_layer": rollback})
        torch.manual_seed(5)
        model = Module()
        fit(callback, model, seen, tmp_path)
        losses.append(model.seen)
    assert losses[0][:4] == losses[1][:4]
    assert losses[0][10:] == pytest.approx(losses[1][4:], rel=1e-6)


def test_a_switch_is_held(tmp_path: Path) -> None:
    callback = StabilityCallback(["amax"], flush_every=3, detector=AlarmAt, actions={"one_layer": "hold_switch"})
    model = module()
    run = trainer(tmp_path, callback, ProgressiveNormCallback(schedule="linear"), max_epochs=2)
    fit_small(run, model)
    lams = [lam[0] for lam in model.lams]
    assert lams[7] > lams[8] == lams[9] == lams[10]
    assert model.lam() == [0.0, 0.0]


def test_a_held_switch_needs_a_switch(tmp_path: Path) -> None:
    callback = StabilityCallback(["amax"], actions={"one_layer": "hold_switch"})
    with pytest.raises(ValueError, match="needs a switch"):
        fit(callback, Module(), batches(2), tmp_path)


def test_a_resumed_run_has_skipped_as_often_as_before(tmp_path: Path) -> None:
    first = skipping()
    run = fit(first, Module(), batches(STEPS, spoilt=[4, 5]), tmp_path)
    run.save_checkpoint(tmp_path / "last.ckpt")
    second = skipping()
    again = trainer(tmp_path, second, num_sanity_val_steps=0, max_epochs=2)
    again.fit(Module(), loader(batches(STEPS, spoilt=[1])), ckpt_path=tmp_path / "last.ckpt")
    assert second.responses is not None
    assert second.responses.done[0].words == "the step is left out (3 of 10 in 100 steps)"


def test_actions_are_checked_before_there_is_a_trainer() -> None:
    with pytest.raises(ValueError, match="did you mean 'rollback'"):
        StabilityCallback(actions={"one_layer": "rolback"})
