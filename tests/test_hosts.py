"""The monitor in other hosts: a plain loop, Lightning Fabric, Hugging Face's Trainer."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm.callbacks.hugging_face import StabilityTrainerCallback
from stabnorm.examples import fabric, plain_loop
from stabnorm.monitor.record import read_record
from tests.watchers import watchers

pytestmark = pytest.mark.slow


def test_a_plain_loop_goes_on_from_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain_loop.main(["--root", str(tmp_path), "--steps", "28"])
    monitor = plain_loop.main(["--root", str(tmp_path), "--steps", "33"])
    assert monitor.history_steps().tolist() == list(range(20, 33))  # saved at 25, flushed every ten
    record = read_record(tmp_path / "record")
    assert record.steps.tolist() == list(range(33))
    assert record.series["loss"].shape == (33,)
    assert "33 steps, 0 alerts" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
def test_fabric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = fabric.main(["--root", str(tmp_path), "--epochs", "1"])
    assert len(monitor.layers) == 9
    assert read_record(tmp_path).steps.tolist() == list(range(15))
    assert "15 steps" in capsys.readouterr().out


class LikeATrainer:
    """Calls a callback as Hugging Face's Trainer does: its loop, its arguments, its checkpoint folders."""

    def __init__(self, folder: Path, callback: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.args, self.callback = types.SimpleNamespace(output_dir=str(folder)), callback

    def call(self, event: str, step: int) -> None:
        state = types.SimpleNamespace(global_step=step, is_world_process_zero=True)
        scheduler = types.SimpleNamespace(get_last_lr=lambda: [0.1 / (step + 1)])
        known = {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": scheduler, "train_dataloader": None}
        getattr(self.callback, event)(self.args, state, types.SimpleNamespace(), **known)

    def train(self, first: int, last: int, save_at: int) -> None:
        self.call("on_train_begin", first)
        for step in range(first, last):
            self.model.train()
            self.call("on_step_begin", step)
            for _ in range(2):
                self.model(torch.randn(5, 4)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.call("on_step_end", step + 1)
            if step + 1 == save_at:
                (Path(self.args.output_dir) / f"checkpoint-{save_at}").mkdir()
                self.call("on_save", step + 1)
                self.model.eval()
                self.model(1e6 * torch.randn(7, 4))  # an evaluation
        self.call("on_train_end", last)


def test_hugging_faces_callback_counts_optimizer_steps_and_resumes(tmp_path: Path) -> None:
    LikeATrainer(tmp_path, StabilityTrainerCallback(flush_every=4)).train(0, 9, save_at=6)
    callback = StabilityTrainerCallback(flush_every=4)
    trainer = LikeATrainer(tmp_path, callback)
    trainer.train(6, 11, save_at=0)
    monitor = callback.monitor
    assert monitor is not None
    assert monitor.history_steps().tolist() == list(range(4, 11))
    assert monitor.history()["tokens"].tolist() == [[10]] * 7
    assert monitor.history()["amax"].max() < 1e3
    record = read_record(tmp_path / "stabnorm_logs")
    assert record.steps.tolist() == list(range(11))
    assert record.series["learning_rate"][10] == pytest.approx(0.1 / 11)
    assert watchers(trainer.model[1]) == 0
