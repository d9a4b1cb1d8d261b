"""The switch on real Trainers: what is converted when, what lam is at which step, and what is refused beforehand."""

import copy
import functools
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from torch import nn

from stabnorm import StabNormError
from stabnorm.callbacks import ProgressiveNormCallback
from stabnorm.nn import PRepBN, RepBN, TaperNorm, UnifiedNorm
from stabnorm.switch.lam import progressive_norms
from stabnorm.switch.schedules import cosine, linear
from tests.lightning_small import BATCHES, WIDTH, fit, loader, module, trainer
from tests.watchers import watchers

LinearSwitch = functools.partial(ProgressiveNormCallback, schedule="linear")  # whose lam is known beforehand


def lam_of(total: int, **options: Any) -> list[list[Any]]:
    return [[pytest.approx(linear(step, total, **options), abs=1e-7)] * 2 for step in range(total)]


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_it_works_in_both_namespaces_and_needs_no_argument(
    tmp_path: Path, namespace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = module(namespace)
    fit(trainer(tmp_path, LinearSwitch(), namespace=namespace), model)
    assert model.lams == lam_of(BATCHES)
    assert model.lam() == [0.0, 0.0]
    for norm in progressive_norms(model).values():
        assert isinstance(norm, nn.LayerNorm)
        assert not torch.equal(norm.rep.weight, torch.ones(WIDTH))  # trained
        norm.fold_affine()
    assert model.validated[0] == [1.0, 1.0]  # the sanity check
    assert model.validated[-1] == [0.0, 0.0]
    assert watchers(model) == 0
    assert "2 of 2 layers switched to RepBN" in capsys.readouterr().out


def test_it_tapers_norms_with_the_published_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = module(clean=False)
    gate = ProgressiveNormCallback("taper", "cosine", start=3, fraction=0.5, mask="mask")
    fit(trainer(tmp_path, gate), model)
    wanted = [cosine(step, BATCHES, start=3, fraction=0.5) for step in range(BATCHES)]
    assert model.lams == [[pytest.approx(lam, abs=1e-7)] * 2 for lam in wanted]
    assert "2 of 2 layers switched to CalibratedScale" in capsys.readouterr().out
    for norm in progressive_norms(model).values():
        assert isinstance(norm, TaperNorm)
        assert 0.1 < norm.rep.scale < 10  # without the padding, whose numbers are 1e4
        assert norm.rep.step == BATCHES
        norm.fold_affine()


@pytest.mark.parametrize("place", ["init", "setup", "configure_model"])
def test_a_model_built_late_is_converted_trained_and_resumed(tmp_path: Path, place: str) -> None:
    callback, model = LinearSwitch(), module(place=place)
    run = trainer(tmp_path, callback, max_steps=6, max_epochs=-1)
    fit(run, model)
    assert model.lams == lam_of(6)
    assert "configure_model" not in vars(model)
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert all(id(p) in optimized for p in model.parameters())
    run.save_checkpoint(tmp_path / "six.ckpt")
    again = module(place=place)
    fit(
        trainer(tmp_path, LinearSwitch(), max_steps=9, max_epochs=-1),
        again,
        ckpt_path=tmp_path / "six.ckpt",
    )
    assert again.at == [6, 7, 8]
    assert again.lams == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("forwards", [1, 3])
def test_lam_moves_with_optimizer_steps_whatever_a_step_takes(tmp_path: Path, accumulate: int, forwards: int) -> None:
    model, total = module(forwards=forwards), BATCHES // accumulate
    callback = ProgressiveNormCallback(schedule="cosine", fraction=1.0)
    fit(trainer(tmp_path, callback, accumulate_grad_batches=accumulate), model)
    assert model.at == [batch // accumulate for batch in range(BATCHES)]
    wanted = [[pytest.approx(cosine(step, total, fraction=1.0), abs=1e-7)] * 2 for step in model.at]
    assert model.lams == wanted
    assert model.lam() == [0.0, 0.0]
    for norm in progressive_norms(model).values():
        assert norm.rep.step == total


def test_norms_without_lam_count_optimizer_steps_and_know_the_loss_scale(tmp_path: Path) -> None:
    from pytorch_lightning.plugins import MixedPrecision

    model, scales = module(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    step = model.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        scales.append((float(model.net[1].loss_scale), scaler.get_scale()))
        return step(batch, batch_idx)

    model.training_step = training_step
    callback = ProgressiveNormCallback(to="unified", norm_options={"warmup_steps": 2})
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(trainer(tmp_path, callback, plugins=[plugin], accumulate_grad_batches=3), model)
    assert isinstance(model.net[1], UnifiedNorm)
    assert model.net[1].step == BATCHES // 3
    assert model.net[1].counts_steps  # by itself again
    assert [own for own, _ in scales] == [theirs for _, theirs in scales]
    assert len({own for own, _ in scales}) > 1


def test_several_optimizers_count_as_global_step_does(tmp_path: Path) -> None:
    model = module(automatic_optimization=False)
    half = list(model.net[0].parameters())

    def optimizers() -> Any:
        rest = [p for p in model.parameters() if not any(p is q for q in half)]
        return [torch.optim.SGD(part, lr=0.01) for part in (half, rest)]

    def training_step(batch: Any, batch_idx: int) -> None:
        model.at.append(model.trainer.global_step)
        model.lams.append(model.lam())
        model.manual_backward(model.loss(batch))
        for optimizer in model.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    model.configure_optimizers, model.training_step = optimizers, training_step
    with pytest.raises(ValueError, match=r"not known beforehand \(optimization is manual\).*total_steps=\.\.\."):
        fit(trainer(tmp_path, LinearSwitch()), model)
    fit(trainer(tmp_path, LinearSwitch(total_steps=2 * BATCHES)), model)
    assert model.at == list(range(0, 2 * BATCHES, 2))
    assert model.lams == lam_of(2 * BATCHES)[::2]
    assert model.lam() == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "adaptive"])
def test_resumed_at_an_epoch_boundary_lam_and_loss_are_identical(tmp_path: Path, schedule: str) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    whole = module(heavy=True)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    options: dict[str, Any] = dict(max_epochs=4, enable_checkpointing=True)
    fit(trainer(tmp_path, ProgressiveNormCallback(schedule=schedule), keep, **options), whole)
    resumed = module(heavy=True)
    run = trainer(tmp_path, ProgressiveNormCallback(schedule=schedule), max_epochs=4)
    fit(run, resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.at == whole.at[2 * BATCHES :]
    assert resumed.lams == whole.lams[2 * BATCHES :]
    assert resumed.losses == whole.losses[2 * BATCHES :]
    assert resumed.lam() == ([0.0, 0.0] if schedule == "linear" else [0.0, 1.0])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "adaptive"])
def test_resumed_within_an_epoch_lam_is_identical_at_each_optimizer_step(tmp_path: Path, schedule: str) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    whole = module(heavy=True)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=5, filename="{step}")
    options: dict[str, Any] = dict(max_epochs=4, accumulate_grad_batches=2, enable_checkpointing=True)
    fit(trainer(tmp_path, ProgressiveNormCallback(schedule=schedule), keep, **options), whole)
    lams = dict(zip(whole.at, whole.lams, strict=True))
    assert len(lams) == 4 * BATCHES // 2
    for stop in (5, 10, 15):
        resumed = module(heavy=True)
        run = trainer(tmp_path, ProgressiveNormCallback(schedule=schedule), max_epochs=4, accumulate_grad_batches=2)
        fit(run, resumed, ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert min(resumed.at) == stop
        assert all(lam == lams[at] for at, lam in zip(resumed.at, resumed.lams, strict=True))


def test_a_run_made_longer_goes_on_as_planned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = module()
    run = trainer(tmp_path, LinearSwitch(), max_steps=10, max_epochs=-1)
    fit(run, model)
    run.save_checkpoint(tmp_path / "ten.ckpt")
    longer = module()
    with caplog.at_level(logging.INFO, "stabnorm"):
        run = trainer(tmp_path, LinearSwitch(), max_steps=20, max_epochs=-1)
        fit(run, longer, ckpt_path=tmp_path / "ten.ckpt")
    assert longer.lams == [[0.0, 0.0]] * 10  # and not back to 0.375
    assert "the run now lasts 20 steps; lam goes on as planned for 10" in caplog.text
    run.fit_loop.epoch_loop.max_steps = 25  # a second fit of the same Trainer
    fit(run, longer)
    assert longer.lams[10:] == [[0.0, 0.0]] * 5


def test_a_run_made_shorter_than_the_switch_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, LinearSwitch(total_steps=20), Stop(at=6), max_steps=30, max_epochs=-1)
    fit(run, module())
    run.save_checkpoint(tmp_path / "six.ckpt")
    short = trainer(tmp_path, LinearSwitch(), max_steps=12, max_epochs=-1)
    with pytest.raises(ValueError, match=r"planned with 20 optimizer steps and lam = 0 from step 16 on, but now it"):
        fit(short, module(), ckpt_path=tmp_path / "six.ckpt")


def test_used_for_another_run_it_starts_afresh_and_a_switched_model_stays_switched(tmp_path: Path) -> None:
    callback, model, other = LinearSwitch(), module(), module()
    fit(trainer(tmp_path, callback), model)
    fit(trainer(tmp_path, callback), other)
    assert other.lams == model.lams
    fit(trainer(tmp_path, callback), model)
    assert model.lams[BATCHES:] == [[0.0, 0.0]] * BATCHES


# --- what is refused, and what is said ---


def test_arguments_out_of_range_are_refused_at_once() -> None:
    for options, message in (
        ({"fraction": 0.0}, "fraction=0.0 is out of range"),
        ({"fraction": 1.2}, "fraction=1.2 is out of range"),
        ({"start": -1}, "start=-1 is out of range"),
        ({"schedule": "linaer"}, "schedule='linaer' is unknown"),
        ({"order": "up"}, "order='up' is unknown"),
        ({"to": "batch"}, "to='batch' is unknown"),
        ({"to": "unified", "schedule": "cosine"}, "say how lam moves, and to='unified' has none"),
        ({"total_steps": 0}, "total_steps=0 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            ProgressiveNormCallback(**options)


def no_norms() -> Any:
    model = module()
    model.net = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    return model


def partly_optimized() -> Any:
    model = module()
    model.configure_optimizers = lambda: torch.optim.SGD(model.net[0].parameters(), lr=0.1)
    return model


def optimizer_of_before() -> Any:
    model = module()
    parameters = list(model.parameters())
    model.configure_optimizers = lambda: torch.optim.SGD(parameters, lr=0.1)
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (no_norms, {}, StabNormError, "Module has no norm to convert"),
        (module, {"start": 5}, ValueError, r"ends at step 15 .start=5, and then 0.8 of 12 steps.* at step 12"),
        (module, {"schedule": lambda step: 1.0}, ValueError, "gives lam=1 at step 12, where the training ends"),
        (module, {"total_steps": 13}, ValueError, "total_steps=13, but the Trainer ends after 12 optimizer steps"),
        (module, {"norm_options": {"moment": 1}}, TypeError, "has no option 'moment'"),
        (module, {"include": "blocks"}, ValueError, "include='blocks' matches none of the 2 norms"),
        (partly_optimized, {}, StabNormError, "net.1.weight, net.1.bias, net.1.rep.weight and 7 more of converted"),
        (optimizer_of_before, {}, StabNormError, "net.1.rep.weight, net.1.rep.bias, net.1.rep.eta and 3 more"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_batch(
    tmp_path: Path, make: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    with pytest.raises(error, match=message):
        fit(trainer(tmp_path, LinearSwitch(**options)), model)
    assert model.losses == []
    assert "configure_model" not in vars(model)


def test_a_training_without_an_end_is_refused_unless_its_length_is_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not known beforehand \(the training has no known end\)"):
        fit(trainer(tmp_path, LinearSwitch(), max_epochs=-1), module())
    model = module()
    fit(trainer(tmp_path, LinearSwitch(total_steps=5), Stop(at=7), max_epochs=-1), model)
    assert model.lam() == [0.0, 0.0]


class Stop(pytorch_lightning.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.at


def said(run: Any, model: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run.fit(model, loader(), loader())
    return [str(warning.message) for warning in warned if "judges the model" in str(warning.message)]


def test_a_model_judged_before_the_end_of_the_switch_is_warned_of(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

    judges = [ModelCheckpoint(tmp_path / "a", monitor="val/loss"), EarlyStopping("val/loss", patience=9)]
    first, second = said(trainer(tmp_path, LinearSwitch(), *judges, enable_checkpointing=True), module())
    assert first.startswith("EarlyStopping(monitor='val/loss') judges the model before step 10, where lam is 0")
    assert second.startswith("ModelCheckpoint(monitor='val/loss') judges the model before step 10, where lam is 0")
    for options in ({"schedule": "constant"}, {"to": "repbn"}):
        judge = ModelCheckpoint(tmp_path / "b", monitor="val/loss")
        run = trainer(tmp_path, ProgressiveNormCallback(**options), judge, enable_checkpointing=True)  # type: ignore[arg-type]
        assert said(run, module()) == []
    last = ModelCheckpoint(tmp_path / "c", save_last=True)
    assert said(trainer(tmp_path, LinearSwitch(), last, enable_checkpointing=True), module()) == []


def test_constant_is_repbn_from_its_start_on(tmp_path: Path) -> None:
    model = module()
    fit(trainer(tmp_path, ProgressiveNormCallback(schedule="constant")), model)
    assert model.lams == [[0.0, 0.0]] * BATCHES


def test_only_what_is_included_is_switched(tmp_path: Path) -> None:
    model = module()
    fit(trainer(tmp_path, LinearSwitch(exclude=r"net\.5")), model)
    assert isinstance(model.net[1], PRepBN)
    assert type(model.net[5]) is nn.LayerNorm


def test_a_replacing_conversion_trains_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = module()
    fit(trainer(tmp_path, ProgressiveNormCallback(to="repbn", norm_options={"init": "language"})), model)
    assert isinstance(model.net[1], RepBN)
    assert model.net[1].init == "language"
    assert model.net[1].eta.item() != 0
    assert "switched" not in capsys.readouterr().out


def test_copies_and_pickles_carry_the_state_and_no_model(tmp_path: Path) -> None:
    callback = LinearSwitch(fraction=0.5, mask="mask")
    fit(trainer(tmp_path, callback), module())
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.switch is None
        assert twin.fraction == 0.5
        assert twin.state_dict() == callback.state_dict()
        assert "log" not in vars(twin)


def test_lightning_cli_takes_it_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    arguments = [
        "--trainer.callbacks+=stabnorm.callbacks.ProgressiveNormCallback",
        "--trainer.callbacks.schedule=adaptive",
        "--trainer.callbacks.fraction=0.7",
        "--trainer.callbacks.norm_options={momentum: 0.2}",
        "--trainer.logger=false",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = LightningCLI(type(module()), run=False, save_config_callback=None, args=arguments)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, ProgressiveNormCallback)]  # type: ignore[attr-defined]
    assert (callback.schedule, callback.fraction, callback.norm_options) == ("adaptive", 0.7, {"momentum": 0.2})
