"""A resumed run goes on where the checkpoint was, with all that was buffered; what a tuner restores is no resume."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import LearningRateFinder, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from stabnorm import StabilityMonitor
from stabnorm.callbacks import ProgressiveNormCallback, StabilityCallback
from stabnorm.monitor import read_record
from stabnorm.nn import PRepBN
from tests.lightning_small import BATCHES, fit, module, trainer

STEPS = 24  # of the switch


def switching_run(folder: Path, watched: bool, resume: Path | None = None, last: int = STEPS) -> Path:
    """Train to a step, and give the folder of the record. The rows that wait then are in no record, as after a kill."""
    callbacks: list[Any] = [ProgressiveNormCallback(schedule="linear", total_steps=STEPS)]
    callbacks += [StabilityCallback(flush_every=7)] * watched
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    options: dict[str, Any] = dict(logger=CSVLogger(folder, name="", version="v"), enable_checkpointing=True)
    run = trainer(folder, *callbacks, keep, max_steps=STEPS, max_epochs=-1, **options)
    model = module()
    if last < STEPS:
        training_step = model.training_step

        def killed(batch: Any, batch_idx: int) -> Any:
            if run.global_step == last:
                os._exit(9)
            return training_step(batch, batch_idx)

        model.training_step = killed
    fit(run, model, ckpt_path=resume)
    return folder / "v"


@pytest.mark.parametrize("watched", [False, True], ids=["switch alone", "switch and monitor"])
def test_what_waits_for_a_flush_is_in_the_checkpoint(tmp_path: Path, watched: bool) -> None:
    whole = read_record(switching_run(tmp_path / "whole", watched))
    other = read_record(switching_run(tmp_path / "other", watched, resume=tmp_path / "whole" / "step=10.ckpt"))
    first = 7 if watched else 0  # the last flush before the checkpoint
    assert other.steps.tolist() == list(range(first, STEPS))
    np.testing.assert_array_equal(other.series["lam"], whole.series["lam"][first:])
    resumed, expected = other.series["branch_gap"], whole.series["branch_gap"][first:]
    np.testing.assert_array_equal(np.isnan(resumed), np.isnan(expected))
    before = 10 - first  # the batches after the checkpoint are other ones
    np.testing.assert_array_equal(resumed[:before], expected[:before])


@pytest.mark.slow
def test_a_killed_switch_loses_nothing_of_lam_and_branch_gap(tmp_path: Path) -> None:
    whole = read_record(switching_run(tmp_path / "whole", watched=True))
    call = f"test_resumed_runs.switching_run(Path({str(tmp_path / 'killed')!r}), True, last=13)"
    code = f"from pathlib import Path; from tests.field import test_resumed_runs; {call}"
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=False
    )
    assert killed.returncode == 9, killed.stderr.decode()
    resumed = read_record(switching_run(tmp_path / "killed", True, resume=tmp_path / "killed" / "step=10.ckpt"))
    assert resumed.steps.tolist() == whole.steps.tolist() == list(range(STEPS))
    np.testing.assert_array_equal(resumed.series["lam"], whole.series["lam"])
    for name in ("amax", "branch_gap"):
        np.testing.assert_array_equal(np.isnan(resumed.series[name]), np.isnan(whole.series[name]))


@pytest.mark.parametrize("middle", [1, 3, 4, 6])
@pytest.mark.parametrize("attached_first", [False, True])
def test_a_companion_measures_at_the_same_steps_after_a_resume(middle: int, attached_first: bool) -> None:
    def run(monitor: StabilityMonitor, model: nn.Module, steps: range) -> None:
        for step in steps:
            model(torch.randn(9, 8, generator=torch.Generator().manual_seed(step)))
            monitor.step()

    def watched() -> tuple[StabilityMonitor, nn.Module]:
        torch.manual_seed(0)
        model = nn.Sequential(PRepBN(8))
        return StabilityMonitor(model, flush_every=2, companions=["switch"]), model

    whole, model = watched()
    with whole:
        run(whole, model, range(12))
    first, model = watched()
    with first:
        run(first, model, range(middle))
        state = first.state_dict()
    second, model = watched()
    if attached_first:
        second.attach()
    second.load_state_dict(state)
    with second:
        run(second, model, range(middle, 12))
    gaps = [monitor.companions["switch"].history()["switch_gap"][:, 0] for monitor in (whole, second)]
    assert (~gaps[0].isnan()).nonzero().flatten().tolist() == [0, 4, 8]
    assert gaps[1].isnan().tolist() == gaps[0][12 - len(gaps[1]) :].isnan().tolist()


def test_hooks_that_come_off_and_on_do_not_change_when_a_companion_measures() -> None:
    model = nn.Sequential(PRepBN(8))
    monitor = StabilityMonitor(model, companions=["switch"])
    for _ in range(10):
        with monitor:
            model(torch.randn(9, 8))
            monitor.step()
    gaps = monitor.companions["switch"].history()["switch_gap"][:, 0]
    assert (~gaps.isnan()).nonzero().flatten().tolist() == [0, 4, 8]


@pytest.mark.slow
@pytest.mark.parametrize("finder_first", [True, False])
def test_a_fold_of_cross_validation_inherits_nothing_from_the_one_before(tmp_path: Path, finder_first: bool) -> None:
    ours: list[Any] = [StabilityCallback(flush_every=5), ProgressiveNormCallback(schedule="linear")]
    histories = []
    for _ in range(3):
        finder = LearningRateFinder(num_training_steps=5, update_attr=False)
        model = module(lr=0.05)
        fit(trainer(tmp_path, *([finder, *ours] if finder_first else [*ours, finder])), model)
        monitor = ours[0].monitor
        assert monitor.history_steps().tolist() == list(range(BATCHES))
        assert [alert for alert in monitor.alerts if alert.step == 0] == []
        histories.append(monitor.history())
        assert model.lams[0] == [1.0, 1.0]
        assert model.lam() == [0.0, 0.0]
    for history in histories[1:]:
        for name, values in histories[0].items():
            torch.testing.assert_close(history[name], values, rtol=0, atol=0, equal_nan=True)


def test_what_a_tuner_restores_in_the_middle_of_a_training_ends_and_changes_nothing(tmp_path: Path) -> None:
    class Tuner(LearningRateFinder):
        def on_fit_start(self, *args: Any, **kwargs: Any) -> None: ...

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    stability, switch = StabilityCallback(flush_every=5), ProgressiveNormCallback(schedule="linear")
    tuner = Tuner(num_training_steps=3, update_attr=False)
    model = module(lr=0.05)
    fit(trainer(tmp_path, stability, switch, tuner, max_epochs=3), model)
    assert stability.monitor is not None
    assert stability.monitor.history_steps().tolist() == list(range(3 * BATCHES))
    assert stability.directory is not None
    lam = read_record(stability.directory).series["lam"][:, 0]
    assert lam[-1] == 0
    assert (np.diff(lam) <= 0).all()
