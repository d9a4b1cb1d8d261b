"""The switch in runs that end early, go on elsewhere, or never begin."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from torch import Tensor

from stabnorm import StabNormError
from stabnorm._models import masks
from stabnorm.callbacks import ProgressiveNormCallback, StabilityCallback
from stabnorm.callbacks._run_facts import refuse_lost_conversion
from stabnorm.convert import convert_norms
from stabnorm.monitor.record import read_record
from stabnorm.switch.lam import progressive_norms
from tests.lightning_small import BATCHES, WIDTH, Body, fit, module, trainer
from tests.versions import needs_weight_averaging

LinearSwitch = functools.partial(ProgressiveNormCallback, schedule="linear")  # whose lam is known beforehand


class Plain(Body, LightningModule):
    """One that another process can be given."""

    def __init__(self) -> None:
        super().__init__()
        self.build()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_processes_that_would_lose_the_conversion_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, LinearSwitch(), strategy="ddp_fork", devices=1)
    with pytest.raises(Exception, match=r"StabNormError: this strategy .* Call stabnorm\.convert_norms\(model\) your"):
        fit(run, Plain())
    refuse_lost_conversion(trainer(tmp_path, strategy="ddp", devices=1))  # launched anew, each with its own script


def test_a_model_that_was_converted_before_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("stabnorm.callbacks.progressive.refuse_lost_conversion", refuse)
    model = module()
    convert_norms(model)
    fit(trainer(tmp_path, LinearSwitch()), model)
    with pytest.raises(AssertionError):
        fit(trainer(tmp_path, LinearSwitch()), module(place="configure_model"))


def test_a_checkpoint_of_a_run_without_the_switch_is_refused_by_name(tmp_path: Path) -> None:
    plain = trainer(tmp_path, max_steps=4, max_epochs=-1)
    fit(plain, module())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    model = module()
    with pytest.raises(StabNormError, match=r"of a training without the switch.* call fit without ckpt_path"):
        fit(trainer(tmp_path, LinearSwitch()), model, ckpt_path=tmp_path / "plain.ckpt")
    assert model.losses == []


@pytest.mark.slow
def test_accumulation_that_changes_between_epochs_is_counted(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import GradientAccumulationScheduler

    cases: list[tuple[dict[str, Any], int]] = [({}, BATCHES + 3 * 3), ({"max_steps": 17}, 17)]
    for options, steps in cases:
        model = module()
        change = GradientAccumulationScheduler({1: 5})  # 12 batches: 5, 5 and 2
        run = trainer(tmp_path, LinearSwitch(fraction=1.0), change, max_epochs=4, **options)
        fit(run, model)
        assert run.global_step == steps
        assert model.lam() == [0.0, 0.0]
        assert model.lams[-1] == [pytest.approx(1 / steps)] * 2  # and not a step too early


@pytest.mark.parametrize("nothing", [{"limit_train_batches": 0}, {"max_steps": 0}], ids=str)
def test_a_fit_without_a_batch_has_nothing_to_refuse(tmp_path: Path, nothing: dict[str, Any]) -> None:
    model = module()
    fit(trainer(tmp_path, LinearSwitch(), **nothing), model)
    assert model.lams == []
    assert "configure_model" not in vars(model)


def test_after_a_resume_that_could_not_start_the_next_run_is_a_new_one(tmp_path: Path) -> None:
    run = trainer(tmp_path, LinearSwitch(), max_steps=6, max_epochs=-1)
    fit(run, module())
    run.save_checkpoint(tmp_path / "six.ckpt")
    callback, model, fresh = LinearSwitch(), module(), module()
    with pytest.raises(ValueError, match="planned with 6 optimizer steps"):
        fit(trainer(tmp_path, callback, max_steps=3, max_epochs=-1), model, ckpt_path=tmp_path / "six.ckpt")
    fit(trainer(tmp_path, callback), model)
    fit(trainer(tmp_path, LinearSwitch()), fresh)
    assert fresh.lams[:2] == [[1.0, 1.0], [0.8999999761581421] * 2]
    assert callback.switch is not None
    assert callback.switch.total_steps == BATCHES


@pytest.mark.parametrize("made", [ProgressiveNormCallback, StabilityCallback])
def test_an_epoch_that_is_left_early_leaves_no_mask_behind(tmp_path: Path, made: Any) -> None:
    model, open_masks = module(clean=False), []

    def on_train_batch_start(batch: Any, batch_idx: int) -> int | None:
        open_masks.append(len(masks._open.contexts))
        return -1 if batch_idx == 3 else None  # Lightning then calls no on_train_batch_end

    model.on_train_batch_start = on_train_batch_start
    fit(trainer(tmp_path, made(mask="mask"), max_epochs=3), model)
    assert open_masks == [1] * 12
    assert (masks._open.contexts, masks._everywhere) == ([], [])


@pytest.mark.parametrize("made", [ProgressiveNormCallback, StabilityCallback])
def test_validation_runs_without_the_mask_of_the_batch_that_was_trained_last(tmp_path: Path, made: Any) -> None:
    model, open_masks = module(clean=False), []
    model.on_validation_batch_start = lambda *_: open_masks.append(len(masks._open.contexts))
    fit(trainer(tmp_path, made(mask="mask"), val_check_interval=4), model)
    assert len(open_masks) >= 3 * BATCHES
    assert set(open_masks) == {0}


@needs_weight_averaging
def test_averaged_weights_are_judged_and_saved_at_the_lam_of_the_step(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint

    model = module(heavy=True)
    keep = ModelCheckpoint(tmp_path, save_last=True)
    average = EMAWeightAveraging(decay=0.9)
    callbacks = [ProgressiveNormCallback(schedule="adaptive"), average, keep]
    fit(trainer(tmp_path, *callbacks, max_epochs=4, enable_checkpointing=True), model)
    ends = model.validated[1 + BATCHES - 1 :: BATCHES]  # the last batch of each epoch's validation
    assert ends[:3] == [[pytest.approx(lam, abs=1e-6) for lam in model.lams[BATCHES * n]] for n in (1, 2, 3)]
    assert 0 < ends[1][0] < 1
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"]["net.1.lam"] == 0
    assert saved["state_dict"]["net.5.lam"] == pytest.approx(1)
    assert not torch.equal(saved["state_dict"]["net.1.rep.weight"], saved["current_model_state"]["net.1.rep.weight"])
    fresh = module(heavy=True)
    convert_norms(fresh)
    fresh.load_state_dict(saved["state_dict"])
    progressive_norms(fresh)["net.1"].fold_affine()


@pytest.mark.slow
def test_the_record_counts_optimizer_steps_and_is_written_as_it_grows(tmp_path: Path) -> None:
    model, sizes = module(), []

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        sizes.append(len(list(tmp_path.rglob("block-*"))))

    model.on_train_batch_start = on_train_batch_start
    options: dict[str, Any] = dict(max_epochs=14, accumulate_grad_batches=3, check_val_every_n_epoch=20)
    fit(trainer(tmp_path, ProgressiveNormCallback(), **options), model)
    record = read_record(tmp_path / "stabnorm_logs" / "run_0")
    assert record.steps.tolist() == list(range(14 * BATCHES // 3))
    assert record.series["lam"][:, 0].tolist() == [lam for lam, _ in model.lams[::3]]
    assert sizes[3 * 50 :] == [1] * (14 * BATCHES - 3 * 50)  # the 56 steps are a block of 50 and one of 6


def test_whatever_is_done_to_the_buffers_at_the_end_lam_is_right(tmp_path: Path) -> None:
    class Blur(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            for buffer in pl_module.buffers():
                if buffer.is_floating_point():
                    buffer.mul_(0.9).add_(0.01)

    model = module(heavy=True)
    fit(trainer(tmp_path, ProgressiveNormCallback(schedule="adaptive"), Blur(), max_epochs=4), model)
    assert model.lam() == [0.0, 1.0]


def test_frozen_parameters_need_no_optimizer(tmp_path: Path) -> None:
    model = module()
    model.net[1].requires_grad_(False)
    model.configure_optimizers = lambda: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    fit(trainer(tmp_path, ProgressiveNormCallback()), model)
    assert model.lam() == [0.0, 0.0]
    assert torch.equal(model.net[1].weight, torch.ones(WIDTH))
