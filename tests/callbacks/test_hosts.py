"""What the hosts share: loss, norm of the gradient, announced changes and actions, in each host."""

import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm.callbacks import StabilityCallback
from stabnorm.callbacks._clipped_norm import ClippedNorm
from stabnorm.callbacks.fabric import FabricMonitor
from stabnorm.callbacks.hugging_face import StabilityTrainerCallback
from stabnorm.monitor.record import read_record
from stabnorm.recorder import read_dump, replay
from tests.actions.nets import batches, everything, net, same, with_a_past
from tests.lightning_small import SIZE, fit, loader, module, trainer


class Model(nn.Module):
    """Returns its loss, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, num_items_in_batch: int | None = None) -> dict[str, Tensor]:
        losses = self.net(x).square()
        return {"loss": losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch}


class LikeATrainer:
    """Calls a callback as Hugging Face's Trainer does, in the order of its loop."""

    def __init__(
        self, folder: Path, callback: Any, *, clip: float = 0.0, items: bool = False, **arguments: Any
    ) -> None:
        self.model, self.callback, self.clip, self.items = Model(), callback, clip, items
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        defaults = {"gradient_accumulation_steps": 2, "train_batch_size": 16, "learning_rate": 0.01}
        self.args = types.SimpleNamespace(output_dir=str(folder), **{**defaults, **arguments})
        self.control = types.SimpleNamespace(should_save=False, should_training_stop=False)
        self.loader = types.SimpleNamespace(dataset=[1, 2])
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.states: list[dict[str, Tensor]] = []

    def call(self, event: str, step: int) -> None:
        state = types.SimpleNamespace(global_step=step, is_world_process_zero=True)
        scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)
        known = {"optimizer": self.optimizer, "lr_scheduler": scheduler, "train_dataloader": self.loader}
        getattr(self.callback, event)(self.args, state, self.control, model=self.model, **known)

    def train(self, data: list[Tensor], *, first: int = 0, past: bool = False, save_at: int = -1) -> "LikeATrainer":
        self.call("on_train_begin", first)
        if past:
            with_a_past(self.callback.monitor, [self.optimizer])
        self.call("on_epoch_begin", first)
        accumulate = self.args.gradient_accumulation_steps
        for step in range(first, first + len(data) // accumulate):
            self.model.train()
            self.call("on_step_begin", step)
            micro = data[(step - first) * accumulate :][:accumulate]
            losses = []
            for x in micro:
                loss = self.model(x=x, num_items_in_batch=16 * accumulate if self.items else None)["loss"]
                losses.append(float(loss.detach()))
                (loss if self.items else loss / accumulate).backward()
            self.losses.append(sum(losses) if self.items else sum(losses) / accumulate)
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            if self.clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.call("on_pre_optimizer_step", step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.call("on_step_end", step + 1)
            self.states.append(everything(self.model, self.optimizer))
            if step + 1 == save_at:
                (Path(self.args.output_dir) / f"checkpoint-{save_at}").mkdir()
                self.call("on_save", step + 1)
        self.call("on_train_end", first + len(data) // accumulate)
        return self


@pytest.mark.parametrize(("clip", "items"), [(0.0, False), (0.01, False), (0.01, True)])
def test_hugging_faces_callback_watches_the_loss_and_the_norm_before_clipping(
    clip: float, items: bool, tmp_path: Path
) -> None:
    trainer = LikeATrainer(tmp_path, StabilityTrainerCallback(flush_every=2), clip=clip, items=items)
    trainer.train(batches(8))
    series = read_record(tmp_path / "stabnorm_logs").series
    assert series["loss"].tolist() == pytest.approx(trainer.losses, rel=1e-5)
    assert series["gradient_norm"].tolist() == pytest.approx(trainer.norms, rel=1e-5)
    assert torch.nn.utils.clip_grad_norm_.__module__.startswith("torch")
    assert not trainer.model._forward_hooks


@pytest.mark.parametrize("kind", ["non_finite", "spike"])
def test_hugging_faces_callback_skips_a_bad_step(kind: str, tmp_path: Path) -> None:
    data = batches(8)
    data[5] = data[5] * (1000 if kind == "spike" else torch.nan)
    callback = StabilityTrainerCallback(flush_every=2, actions={kind: "skip"})
    trainer = LikeATrainer(tmp_path, callback, clip=1.0).train(data, past=True)
    assert same(trainer.states[1], trainer.states[2])
    assert not same(trainer.states[2], trainer.states[3])
    assert callback.responses is not None
    (done,) = callback.responses.done
    assert (done.action, done.why.kind, done.why.layer, done.why.step) == ("skip", kind, "net.1", 2)


def test_checkpoint_and_stop_are_the_trainers_own(tmp_path: Path) -> None:
    data = batches(4)
    data[1] = data[1] * torch.nan
    callback = StabilityTrainerCallback(flush_every=1, actions={"non_finite": ["skip", "checkpoint", "stop"]})
    trainer = LikeATrainer(tmp_path, callback, gradient_accumulation_steps=1).train(data)
    assert trainer.control.should_save
    assert trainer.control.should_training_stop
    assert callback.responses is not None
    assert [done.words for done in callback.responses.done][1] == "the Trainer saves a checkpoint"


def test_actions_of_hugging_faces_callback_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^kind='nonfinite' is unknown"):
        StabilityTrainerCallback(actions={"nonfinite": "skip"})
    with pytest.raises(ValueError, match="'hold_switch' needs"):
        LikeATrainer(tmp_path, StabilityTrainerCallback(actions={"any": "hold_switch"})).train(batches(2))
    with pytest.raises(ValueError, match="as with DeepSpeed"):
        LikeATrainer(tmp_path, StabilityTrainerCallback(actions={"any": "stop"}), deepspeed="zero.json").train([])


def test_what_was_changed_before_a_run_goes_on_is_announced(tmp_path: Path) -> None:
    LikeATrainer(tmp_path, StabilityTrainerCallback(flush_every=2)).train(batches(8), save_at=3)
    changed: dict[str, Any] = {"train_batch_size": 8, "learning_rate": 0.02, "bf16": True}
    for change in ({}, changed):
        callback = StabilityTrainerCallback(flush_every=2)
        LikeATrainer(tmp_path, callback, **change).train(batches(4), first=3)
    events = read_record(tmp_path / "stabnorm_logs").events
    assert [event.data["reason"] for event in events if event.kind == "announced"] == [
        "the batch size is 8 instead of 16, the precision is bf16 instead of fp32, the learning rate is set to 0.02 "
        "instead of 0.01"
    ]


def test_another_data_set_is_announced_at_an_epoch(tmp_path: Path) -> None:
    callback = StabilityTrainerCallback()
    trainer = LikeATrainer(tmp_path, callback)
    trainer.call("on_train_begin", 0)
    trainer.call("on_epoch_begin", 0)
    trainer.loader = types.SimpleNamespace(dataset=[3])
    trainer.call("on_epoch_begin", 0)
    trainer.call("on_train_end", 0)
    events = read_record(tmp_path / "stabnorm_logs").events
    assert [event.data["reason"] for event in events] == ["another data set"]


def test_the_norm_of_other_models_is_not_taken() -> None:
    ours, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    clipped = ClippedNorm(ours)
    clipped.attach()
    try:
        for model, factor in ((ours, 1.0), (other, 100.0)):
            model(factor * torch.tensor([[3.0, 4.0]])).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = clipped.take()
        assert norm is not None
        assert float(norm) == pytest.approx(5.0)
        assert clipped.take() is None
    finally:
        clipped.detach()


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
@pytest.mark.parametrize("clip", [False, True])
def test_fabrics_monitor_watches_the_norm_before_clipping_and_skips(clip: bool, tmp_path: Path) -> None:
    fabric_of = pytest.importorskip("lightning.fabric").Fabric
    fabric = fabric_of(accelerator="cpu", devices=1)
    model = fabric.setup(net())
    raw = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = fabric.setup_optimizers(raw)
    data = batches(4)
    data[2] = data[2] * 1000
    norms, states = [], []
    with FabricMonitor(fabric, model, flush_every=2, directory=tmp_path) as monitor:
        actions = monitor.actions(optimizer, {"spike": "skip"})
        with_a_past(monitor, [optimizer])
        for x in data:
            actions.begin_step()
            loss = model(x).square().mean()
            fabric.backward(loss)
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
            if not actions.skips(optimizer, loss=loss):
                if clip:
                    fabric.clip_gradients(model, optimizer, max_norm=0.01)
                optimizer.step()
            monitor.step(loss=loss, optimizer=optimizer)
            actions.end_step()
            optimizer.zero_grad()
            states.append(everything(model.module, raw))
    assert [done.why.step for done in actions.done] == [2]
    assert same(states[1], states[2])
    series = read_record(tmp_path).series
    known = series["gradient_norm"][[0, 1, 3]].tolist()  # nothing is left of the gradient of a skipped step
    assert known == pytest.approx([norms[0], norms[1], norms[3]], rel=1e-5)
    assert series["learning_rate"].tolist() == pytest.approx([0.01] * 4)


@pytest.mark.slow
def test_hugging_faces_own_trainer_gives_loss_and_norm_and_is_skipped(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    x = torch.stack(batches(6))
    x[4] = torch.nan
    rows = [{"x": row} for row in x.flatten(0, 1)]
    callback = StabilityTrainerCallback(flush_every=2, actions={"non_finite": "skip"})
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=16, learning_rate=1e-3, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no", max_grad_norm=0.01, seed=0,
    )  # fmt: skip
    made = Model()
    trainer = transformers.Trainer(model=made, args=arguments, train_dataset=rows, callbacks=[callback])
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    series = read_record(tmp_path / "stabnorm_logs").series
    told = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(told) == 6
    finite = [0, 1, 2, 3, 5]
    assert series["loss"][finite].tolist() == pytest.approx([told[step]["loss"] for step in finite], rel=1e-3)
    norms = [told[step]["grad_norm"] for step in finite]
    assert series["gradient_norm"][finite].tolist() == pytest.approx(norms, rel=1e-3)
    assert callback.responses is not None
    assert [done.why.step for done in callback.responses.done] == [4]
    assert all(value.isfinite().all() for value in made.state_dict().values())


def test_lightning_announces_another_batch_size_when_a_run_goes_on(tmp_path: Path) -> None:
    first = trainer(tmp_path, StabilityCallback(["amax"], dumps=0), max_steps=4)
    fit(first, module())
    first.save_checkpoint(tmp_path / "last.ckpt")
    for size, expected in ((SIZE, []), (2 * SIZE, [f"the batch size is {2 * SIZE} instead of {SIZE}"])):
        callback = StabilityCallback(["amax"], dumps=0)
        again = trainer(tmp_path / str(size), callback, max_steps=6, max_epochs=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again.fit(module(), loader(batch_size=size), ckpt_path=tmp_path / "last.ckpt")
        assert callback.directory is not None
        events = read_record(callback.directory).events
        assert [event.data["reason"] for event in events if event.kind == "announced"] == expected


def test_hugging_faces_callback_says_which_row_did_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = batches(6)
    data[3][5] *= 1000
    callback = StabilityTrainerCallback(flush_every=2, actions={"spike": "skip"})
    host = LikeATrainer(tmp_path, callback)
    host.train(data, past=True)
    said = "Row 5 of micro-batch 1 of 32 did it: at the input of net.1 the largest value is"
    assert f"stabnorm, step 1: {said}" in caplog.text
    assert len(host.losses) == 3
    assert callback.recorder is not None
    (folder,) = callback.recorder.dumps
    assert folder.parent == tmp_path / "stabnorm_logs" / "dumps"
    again = replay(read_dump(folder), Model())
    assert again.loss == pytest.approx(host.losses[1], rel=1e-5)
    assert again.rows is not None
    assert again.rows.sentence.startswith(said)
    with pytest.raises(ValueError, match="dumps=-1"):
        StabilityTrainerCallback(dumps=-1)
    with pytest.raises(ValueError, match="record_bytes=5"):
        StabilityTrainerCallback(record_bytes=5)
