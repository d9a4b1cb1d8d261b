"""The callback on real Trainers: both namespaces, masks, accumulation, AMP, resume, and exceptions."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stabnorm import StabilityMonitor
from stabnorm.callbacks import StabilityCallback
from stabnorm.monitor import Alert
from stabnorm.monitor.statistics import PRESETS, Statistic
from tests.lightning_padded import BATCHES, Batches, fit, loader, module, record_of, watched
from tests.lightning_small import trainer
from tests.watchers import watchers


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("bare", [False, True])
def test_it_works_in_both_namespaces_and_needs_no_argument(tmp_path: Path, namespace: str, bare: bool) -> None:
    callback, model = StabilityCallback(), module(namespace)
    run = trainer(tmp_path, namespace=namespace, callbacks=callback if bare else [callback])
    fit(run, model)
    history = watched(callback).history()
    assert history["token_std_mean"].shape == (BATCHES, 2)
    assert watched(callback).layers == ("net.0", "net.3")
    assert history["amax"].max() < 1e5  # neither the sanity check nor validation counted
    assert watchers(model) == 0


def test_losses_and_weights_are_bit_identical_with_and_without(tmp_path: Path) -> None:
    bare, watched_model = module(), module()
    fit(trainer(tmp_path), bare)
    fit(trainer(tmp_path, StabilityCallback()), watched_model)
    assert all(torch.equal(a, b) for a, b in zip(bare.losses, watched_model.losses, strict=True))
    for a, b in zip(bare.parameters(), watched_model.parameters(), strict=True):
        assert torch.equal(a, b)


class OneBatch(Batches):
    """The same data whatever the batch size: the mean over tokens of a loss must not depend on how it is split."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        item["mask"] = torch.ones(6, dtype=torch.bool)
        item["x"] = torch.randn(6, 8, generator=torch.Generator().manual_seed(index))
        return item


def test_accumulation_of_four_gives_the_history_of_one_big_batch(tmp_path: Path) -> None:
    histories, losses = [], []
    for size, accumulate in ((16, 1), (4, 4)):
        callback, model = StabilityCallback(), module()
        run = trainer(tmp_path, callback, accumulate_grad_batches=accumulate, logger=CSVLogger(tmp_path, version=size))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning.*")
            run.fit(model, DataLoader(OneBatch(), batch_size=size))
        histories.append(watched(callback).history())
        losses.append(record_of(callback).series["loss"])
    whole, parts = histories
    assert whole["amax"].shape == parts["amax"].shape == (3, 2)
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-6, atol=0)


def test_a_mask_by_key_leaves_the_padding_out(tmp_path: Path) -> None:
    by_key, by_function = StabilityCallback(mask="mask"), StabilityCallback(mask=lambda batch: batch["mask"])
    for callback in (by_key, by_function):
        fit(trainer(tmp_path, callback), module(clean=False))
        history = watched(callback).history()
        assert history["amax"][:, 0].max() < 10
        lengths = [sum(2 + i % 4 for i in range(4 * b, 4 * b + 4)) for b in range(BATCHES)]
        assert history["tokens"][:, 0].tolist() == lengths


def test_a_mask_that_is_no_key_is_refused_with_the_keys_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mask='padding' is no entry of the batch, which has \['x', 'mask', 'y'\]"):
        fit(trainer(tmp_path, StabilityCallback(mask="padding")), module())


def test_a_mask_function_that_returns_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the mask function returned None; it is to be a bool tensor"):
        fit(trainer(tmp_path, StabilityCallback(mask=lambda batch: None)), module())  # type: ignore[arg-type,return-value]


def test_a_mask_of_the_wrong_shape_is_refused_at_the_first_forward_naming_the_layer(tmp_path: Path) -> None:
    callback, model = StabilityCallback(mask=lambda batch: batch["mask"][:, 1:]), module()
    with pytest.raises(ValueError, match=r"the mask has shape \(4, 5\), but the input of norm 'net.0'"):
        fit(trainer(tmp_path, callback), model)
    assert watchers(model) == 0


def test_an_exception_leaves_no_hook_and_keeps_what_was_seen(tmp_path: Path) -> None:
    callback, model = StabilityCallback(mask="mask"), module(poison=7)
    with pytest.raises(RuntimeError, match="boom"):
        fit(trainer(tmp_path, callback), model)
    assert watchers(model) == 0
    assert record_of(callback).steps.tolist() == list(range(7))
    with StabilityMonitor(model):  # nor is the mask left on
        model.net(torch.randn(4, 9, 8))


def test_errors_come_before_the_first_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'crest'"):
        StabilityCallback(preset=["crests"])
    with pytest.raises(ValueError, match="flush_every"):
        StabilityCallback(flush_every=0)
    model = module()
    model.net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="no normalization layer found in Module"):
        fit(trainer(tmp_path, StabilityCallback()), model)
    assert model.losses == []


def test_resumed_in_the_middle_it_goes_on_with_the_same_figures(tmp_path: Path) -> None:
    whole = StabilityCallback()
    fit(trainer(tmp_path, whole, max_epochs=2), module())
    first = StabilityCallback()
    run = trainer(tmp_path, first)
    fit(run, module())
    run.save_checkpoint(tmp_path / "middle.ckpt")
    second = StabilityCallback()
    fit(trainer(tmp_path, second, max_epochs=2), module(), ckpt_path=tmp_path / "middle.ckpt")
    assert watched(second).history_steps().tolist() == list(range(BATCHES, 2 * BATCHES))
    for name, values in watched(whole).history().items():
        torch.testing.assert_close(
            watched(second).history()[name], values[BATCHES:], rtol=1e-6, atol=1e-7, equal_nan=True
        )


class EverySeventh:
    """A detector that knows nothing but how many steps it has seen."""

    def __init__(self, statistics: Any, rows: Any, fading: Any = ()) -> None:
        self.rows, self.steps = rows, 0

    def update(self, first_step: int, values: Tensor, tokens: Tensor, nonfinite: Tensor) -> list[Alert]:
        alerts = []
        for step in range(first_step, first_step + len(values)):
            self.steps += 1
            if self.steps % 7 == 0:
                alerts.append(Alert(step, self.rows[0], "amax", 0.0, 0.0, f"{self.steps} steps"))
        return alerts

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_another_detector_is_handed_on_and_resumes_where_it_was(tmp_path: Path) -> None:
    first, second = (StabilityCallback(detector=EverySeventh) for _ in range(2))
    run = trainer(tmp_path, first, max_steps=BATCHES - 3)
    fit(run, module())
    run.save_checkpoint(tmp_path / "middle.ckpt")
    fit(trainer(tmp_path, pickle.loads(pickle.dumps(second)), max_epochs=2), module())
    fit(trainer(tmp_path, second, max_epochs=2), module(), ckpt_path=tmp_path / "middle.ckpt")
    alerts = watched(second).alerts
    assert [alert.step for alert in alerts] == list(range(6, 2 * BATCHES, 7))
    assert [alert.reason for alert in alerts] == [f"{alert.step + 1} steps" for alert in alerts]


def test_resumed_from_a_checkpoint_inside_an_epoch_each_step_is_counted_once(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=5, save_top_k=-1)
    fit(trainer(tmp_path, StabilityCallback(), keep, enable_checkpointing=True), module())
    (middle,) = (tmp_path / "ckpt").glob("*step=5.ckpt")
    callback = StabilityCallback()
    fit(trainer(tmp_path, callback), module(), ckpt_path=middle)
    assert watched(callback).history_steps().tolist() == list(range(BATCHES))  # nothing was flushed by then


def test_used_for_another_run_it_starts_afresh(tmp_path: Path) -> None:
    callback = StabilityCallback()
    model = module()
    with torch.no_grad():
        model.net[1].weight[0, 0] = torch.nan
    fit(trainer(tmp_path, callback), model)
    assert watched(callback).alerts
    fit(trainer(tmp_path, callback), module())
    assert watched(callback).alerts == []
    assert watched(callback).history_steps().tolist() == list(range(BATCHES))


def test_a_part_compiled_and_run_before_the_fit_is_watched(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = module()
    compiled: Any = torch.compile(model.net, backend="eager")
    compiled(torch.randn(4, 6, 8))
    model.net = compiled
    callback = StabilityCallback()
    fit(trainer(tmp_path, callback), model)
    assert watched(callback).layers == ("net.0", "net.3")
    assert watched(callback).history()["tokens"][:, 0].tolist() == [24] * BATCHES


def test_added_on_resume_it_counts_on_from_the_runs_step(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    fit(run, module())
    run.save_checkpoint(tmp_path / "bare.ckpt")
    callback = StabilityCallback()
    fit(trainer(tmp_path, callback, max_epochs=2), module(), ckpt_path=tmp_path / "bare.ckpt")
    assert watched(callback).history_steps().tolist() == list(range(BATCHES, 2 * BATCHES))


def test_manual_optimization_with_its_own_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    model = module(automatic_optimization=False)

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> None:
        model.manual_backward(model.loss(batch, batch_idx) / 3)
        if batch_idx % 3 == 2:
            model.optimizers().step()
            model.optimizers().zero_grad()

    model.training_step = training_step
    callback = StabilityCallback()
    fit(trainer(tmp_path, callback), model)
    assert watched(callback).history()["tokens"][:, 0].tolist() == [3 * 4 * 6] * (BATCHES // 3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_mixed_precision_gives_finite_statistics_and_gradients_free_of_the_loss_scale(
    tmp_path: Path, precision: str
) -> None:
    plain, mixed = StabilityCallback(), StabilityCallback()
    fit(trainer(tmp_path, plain), module())
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # Lightning makes a scaler for CUDA only
        from pytorch_lightning.plugins import MixedPrecision

        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    fit(trainer(tmp_path, mixed, **options), module())
    of_mixed, theirs = watched(mixed).history(), watched(plain).history()
    for name in ("token_std_mean", "grad_gain", "grad_shift"):
        torch.testing.assert_close(of_mixed[name], theirs[name], rtol=0.1, atol=1e-3, equal_nan=True)


class Shared(pytorch_lightning.Callback):
    """Stands for another callback of ours."""

    def __init__(self) -> None:
        self.found: StabilityCallback | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.found = StabilityCallback.of(trainer)


def test_other_callbacks_find_the_one_monitor_in_either_order(tmp_path: Path) -> None:
    for first in (True, False):
        callback, other = StabilityCallback(), Shared()
        fit(trainer(tmp_path, *((other, callback) if first else (callback, other))), module())
        assert other.found is callback
    assert StabilityCallback.of(trainer(tmp_path)) is None


def test_two_in_one_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `?StabilityCallback"):
        trainer(tmp_path, StabilityCallback(), StabilityCallback())


def test_a_learning_rate_search_does_not_count(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import LearningRateFinder

    model = module(lr=0.05)
    callback = StabilityCallback()
    fit(trainer(tmp_path, callback, LearningRateFinder(num_training_steps=5)), model)
    history = watched(callback).history()
    assert history["tokens"][:, 0].tolist() == [24] * BATCHES
    assert watchers(model) == 0


def test_copies_and_pickles_carry_state_and_no_model(tmp_path: Path) -> None:
    callback = StabilityCallback(flush_every=7)
    fit(trainer(tmp_path, callback), module())
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.monitor is None
        assert twin.flush_every == 7
        assert twin.state_dict()["monitor"]["steps_done"] == BATCHES
        assert "log" not in vars(twin)


def test_lightning_cli_takes_it_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = LightningCLI(
            type(module()),
            run=False,
            save_config_callback=None,
            args=[
                "--trainer.callbacks+=stabnorm.callbacks.StabilityCallback",
                "--trainer.callbacks.preset=economy",
                "--trainer.callbacks.flush_every=3",
                "--trainer.callbacks.mask=mask",
                "--trainer.logger=false",
            ],
        )
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, StabilityCallback)]  # type: ignore[attr-defined]
    assert (callback.preset, callback.flush_every, callback.mask) == ("economy", 3, "mask")


def test_full_and_statistics_of_your_own_are_fed_by_the_trainer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = Statistic("power", compute=lambda now, past: now.mean_over_channels(now.second_moment), threshold=1e-9)
    callback = StabilityCallback([*PRESETS["full"], own])
    model = module()
    model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), lr=1e-3)
    fit(trainer(tmp_path, callback), model)
    history, record = watched(callback).history(), record_of(callback)
    for name in ("power", "adam_staleness", "gradient_to_eps", "gain_spread", "effective_samples"):
        assert history[name].isfinite().all(), name
    assert "over 1e-9 in most of the run's last tenth" in " ".join(caplog.text.split())
    for name, values in history.items():
        torch.testing.assert_close(torch.from_numpy(record.series[name]), values, equal_nan=True)


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path: Path) -> None:
    callback, model = StabilityCallback(), module()
    run = trainer(tmp_path, callback)
    fit(run, model)
    run.fit_loop.max_epochs = 2
    fit(run, model)
    assert watched(callback).history_steps().tolist() == list(range(BATCHES, 2 * BATCHES))


def test_validate_and_predict_alone_need_no_norms_and_leave_no_trace(tmp_path: Path) -> None:
    model = module()
    model.net = nn.Sequential(nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, StabilityCallback()).validate(model, loader(), verbose=False)
    assert watchers(model) == 0
