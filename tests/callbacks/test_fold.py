"""The folded model at the end of real fits: what is written, and what is refused."""

import copy
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn

from stabnorm import StabNormError, apply_manifest, convert_norms
from stabnorm.callbacks import FoldCallback, ProgressiveNormCallback, StabilityCallback
from stabnorm.fold import FoldedNorm
from tests.callbacks.test_progressive_ranks import variables_of
from tests.lightning_small import BATCHES, WIDTH, fit, loader, module, trainer
from tests.processes import one_after_the_other, run_ranks
from tests.versions import needs_weight_averaging
from tests.watchers import watchers

FILES = ["folded.pt", "folded_manifest.json", "folded_report.txt"]


def clean(batch: dict[str, Tensor]) -> Tensor:
    return torch.where(batch["mask"][..., None], batch["x"], 0)


def folding(**options: Any) -> FoldCallback:
    return FoldCallback("net", clean, **options)


def written(directory: Path | None) -> list[str]:
    """What the fold wrote; the folder of the run has the record as well."""
    return [] if directory is None else sorted(path.name for path in directory.glob("folded*"))


def loaded(directory: Path | None, fresh: nn.Module) -> nn.Module:
    """What somebody who has nothing but the files and the model's code makes of them."""
    assert directory is not None
    apply_manifest(fresh, json.loads((directory / "folded_manifest.json").read_text(encoding="utf-8")))
    fresh.load_state_dict(torch.load(directory / "folded.pt"), strict=True)
    return fresh.eval()


@torch.no_grad()
def check_same(folded: nn.Module, trained: nn.Module) -> None:
    x = torch.randn(5, 6, WIDTH, generator=torch.Generator().manual_seed(3))
    expected = copy.deepcopy(trained).eval().double()(x.double())
    assert (folded(x).double() - expected).abs().max() < 1e-5 * expected.abs().max()


class Last(pytorch_lightning.Callback):
    """Keeps what training has left."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.state = copy.deepcopy(pl_module.state_dict())
        self.flags = [(m.training, type(m)) for m in pl_module.modules()]


# --- what is written ---


@pytest.mark.parametrize("order", ["before", "after", "between"])
def test_the_files_make_a_fresh_model_compute_what_was_trained_wherever_the_callback_stands(
    tmp_path: Path, order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    callback, others, last = folding(), [ProgressiveNormCallback(), StabilityCallback()], Last()
    others.insert({"before": 0, "after": 2, "between": 1}[order], callback)
    model = module()
    fit(trainer(tmp_path, *others, last), model)
    assert written(callback.directory) == FILES
    folded = loaded(callback.directory, module().net)  # LayerNorms and all
    assert sum(isinstance(part, FoldedNorm) for part in folded.modules()) == 2
    assert not any("norm" in type(part).__name__.lower() for part in folded.modules() if type(part) is not FoldedNorm)
    check_same(folded, model.net)
    assert callback.result is not None
    assert callback.result.max_rel_error < 1e-9
    report = str(callback.result)
    assert report in capsys.readouterr().out
    assert callback.directory is not None
    assert (callback.directory / "folded_report.txt").read_text(encoding="utf-8") == report + "\n"
    # The trained module is as training left it.
    assert all(torch.equal(value, last.state[name]) for name, value in model.state_dict().items())
    assert [(m.training, type(m)) for m in model.modules()] == last.flags
    assert watchers(model) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def draw_a_number(*_: Any) -> None:
    torch.rand(())


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_it_changes_no_bit_of_the_training_in_both_namespaces(tmp_path: Path, namespace: str) -> None:
    results = []
    for callbacks in ([ProgressiveNormCallback()], [ProgressiveNormCallback(), folding()]):
        pytorch_lightning.seed_everything(3, verbose=False)
        model = module(namespace)
        model.net.register_forward_pre_hook(draw_a_number)
        fit(trainer(tmp_path, *callbacks, namespace=namespace), model)
        results.append((model.losses, model.state_dict(), torch.rand(3)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())
    assert torch.equal(results[0][2], results[1][2])


def test_a_checkpoint_of_the_run_trains_on_and_folds_again(tmp_path: Path) -> None:
    callbacks: list[Any] = [ProgressiveNormCallback(), folding()]
    run = trainer(tmp_path, *callbacks, max_steps=6, max_epochs=-1)
    fit(run, module())
    run.save_checkpoint(tmp_path / "six.ckpt")
    again, callback = module(), folding()
    run = trainer(tmp_path, callback, ProgressiveNormCallback(), max_steps=9, max_epochs=-1)
    fit(run, again, ckpt_path=tmp_path / "six.ckpt")
    assert again.at == [6, 7, 8]
    check_same(loaded(callback.directory, module().net), again.net)
    assert callback.directory != callbacks[1].directory


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@needs_weight_averaging
def test_averaged_weights_are_folded_with_lam_at_0_also_before_the_switch(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import EMAWeightAveraging

    callback, model = folding(), module()
    fit(trainer(tmp_path, callback, ProgressiveNormCallback(), EMAWeightAveraging(decay=0.8), max_epochs=2), model)
    assert callback.result is not None
    assert [norm.status for norm in callback.result.norms] == ["forward", "forward"]
    check_same(loaded(callback.directory, module().net), model.net)


def test_a_layer_that_keeps_its_norm_is_named_and_loads_into_a_converted_model(tmp_path: Path) -> None:
    callback, model = folding(), module(heavy=True)
    fit(trainer(tmp_path, callback, ProgressiveNormCallback(schedule="adaptive"), max_epochs=4), model)
    assert callback.result is not None
    assert [norm.status for norm in callback.result.norms] == ["forward", "kept"]
    assert "lam" in callback.result.norms[1].reason
    fresh = module(heavy=True).net
    convert_norms(fresh)
    check_same(loaded(callback.directory, fresh), model.net)


def test_a_module_built_late_is_folded(tmp_path: Path) -> None:
    callback, model = folding(), module(place="configure_model")
    fit(trainer(tmp_path, callback, ProgressiveNormCallback()), model)
    fresh = module()
    check_same(loaded(callback.directory, fresh.net), model.net)


def test_tensorboard_shows_the_report(tmp_path: Path) -> None:
    from pytorch_lightning.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback, logger = folding(), TensorBoardLogger(tmp_path)
    fit(trainer(tmp_path, ProgressiveNormCallback(), callback, logger=logger), module())
    assert callback.directory == Path(logger.log_dir) / "stabnorm_logs"
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (text,) = events.Tensors("stability/fold/text_summary")
    assert b"2 norms: 2 forward" in text.tensor_proto.string_val[0]
    assert text.step == BATCHES


def test_a_fast_dev_run_folds_and_writes_nothing(tmp_path: Path) -> None:
    callback = folding()
    fit(trainer(tmp_path, ProgressiveNormCallback(), callback, fast_dev_run=True), module())
    assert callback.result is not None
    assert callback.directory is None
    assert not list(tmp_path.rglob("folded*"))


def one_rank(rank: int, folder: Path) -> None:
    os.environ |= variables_of(rank)
    warnings.filterwarnings("error", message="FoldCallback")
    callback, model = folding(), module()
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": True, "max_epochs": 2}
    fit(trainer(folder, callback, ProgressiveNormCallback(norm_options={"sync": True}), **options), model)
    torch.save((callback.directory, model.net.state_dict()), folder / f"{rank}.pt")


@one_after_the_other
@pytest.mark.slow
def test_of_two_processes_the_first_one_writes(tmp_path: Path) -> None:
    run_ranks(one_rank, tmp_path)
    (first, state), (second, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert written(first) == FILES
    assert second is None
    trained = module().net
    convert_norms(trained)
    trained.load_state_dict(state)
    check_same(loaded(first, module().net), trained)


# --- what is refused before the training ---


def refused(
    tmp_path: Path, callback: FoldCallback, *others: Any, model: Any = None, **options: Any
) -> pytest.ExceptionInfo[Any]:
    model = module() if model is None else model
    with pytest.raises((ValueError, StabNormError)) as refusal:
        fit(trainer(tmp_path, callback, *others, **options), model)
    assert not model.losses
    assert not list(tmp_path.rglob("folded*"))
    return refusal


def test_a_model_in_which_nothing_would_fold_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, folding()).match(
        r"nothing in net could be folded.*its norms are LayerNorm.*ProgressiveNormCallback"
    )
    model = module()
    model.net = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    refused(tmp_path, FoldCallback(), model=model).match(
        "nothing in Module could be folded at the end: it has no norms"
    )


def test_what_does_not_run_is_refused(tmp_path: Path) -> None:
    switch = ProgressiveNormCallback()
    refused(tmp_path, FoldCallback(), switch).match(
        r"cannot fold Module: the model does not run on the example.*module='net'"
    )
    refused(tmp_path, FoldCallback("net"), switch).match(
        "cannot fold net: the model does not run.*example=lambda batch"
    )
    given = FoldCallback("net", torch.randn(2, WIDTH + 1))
    refused(tmp_path, given, switch, num_sanity_val_steps=0).match("cannot fold net: the model does not run")
    refused(tmp_path, FoldCallback("body"), switch).match("Module has no part 'body'. It has net")


class OptimizedModule(nn.Sequential):
    """By its name, as the fold knows torch.compile's."""


def test_a_compiled_part_is_refused(tmp_path: Path) -> None:
    model = module()
    model.net = OptimizedModule(*model.net)
    refused(tmp_path, folding(), ProgressiveNormCallback(), model=model).match("the model is compiled.*Fold first")


def test_a_strategy_that_shards_is_refused(tmp_path: Path) -> None:
    from pytorch_lightning.strategies import SingleDeviceStrategy

    class FSDPStrategy(SingleDeviceStrategy):
        """By its name."""

    run = {"strategy": FSDPStrategy(device="cpu"), "accelerator": "auto"}
    refused(tmp_path, folding(), ProgressiveNormCallback(), **run).match("FSDPStrategy shards the parameters")


def test_arguments_are_checked_at_once() -> None:
    with pytest.raises(TypeError, match="no option 'inplace'"):
        FoldCallback(options={"inplace": True})
    with pytest.raises(TypeError, match=r"example=.* is of type str"):
        FoldCallback(example="x")


# --- when nothing is written at the end ---


def test_norms_that_never_left_are_a_warning_and_the_training_stays(tmp_path: Path) -> None:
    callback, model = folding(), module()
    convert_norms(model)  # and nobody moves lam
    with pytest.warns(UserWarning, match=r"FoldCallback wrote no folded model: every norm stays(.|\n)*lam"):
        fit(trainer(tmp_path, callback), model)
    assert len(model.losses) == BATCHES
    assert callback.result is None
    assert callback.directory is None
    assert not list(tmp_path.rglob("folded*"))


def test_strict_is_about_the_end_and_not_about_the_trial(tmp_path: Path) -> None:
    callback, model = folding(options={"strict": True}), module()
    fit(trainer(tmp_path, callback, ProgressiveNormCallback()), model)
    assert written(callback.directory) == FILES
    callback, model = folding(options={"strict": True}), module(heavy=True)
    with pytest.warns(UserWarning, match=r"wrote no folded model: 1 norms are kept, the first is '5'"):
        fit(trainer(tmp_path, callback, ProgressiveNormCallback(schedule="adaptive"), max_epochs=4), model)
    assert callback.directory is None


def test_a_fold_that_fails_at_the_end_is_a_warning(tmp_path: Path) -> None:
    class Poison(pytorch_lightning.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[0] = nn.Linear(WIDTH + 1, WIDTH)

    callback = folding()
    with pytest.warns(UserWarning, match="wrote no folded model: the model does not run on the example"):
        fit(trainer(tmp_path, callback, ProgressiveNormCallback(), Poison()), module())
    assert not list(tmp_path.rglob("folded*"))


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    callback, model = folding(), module()
    monkeypatch.setattr("stabnorm.callbacks.fold._write", full)
    with pytest.warns(UserWarning, match="wrote no folded model: OSError: No space left"):
        fit(trainer(tmp_path, callback, ProgressiveNormCallback()), model)
    assert len(model.losses) == BATCHES
    assert callback.directory is None


def test_after_an_exception_nothing_is_written_and_the_callback_can_be_used_again(tmp_path: Path) -> None:
    callback, model = folding(), module(poison=3)
    run = trainer(tmp_path, callback, ProgressiveNormCallback())
    with pytest.raises(RuntimeError, match="boom"):
        fit(run, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning.*")
        run.validate(model, loader(), verbose=False)
    assert not list(tmp_path.rglob("folded*"))
    model = module()
    fit(trainer(tmp_path, callback, ProgressiveNormCallback()), model)
    check_same(loaded(callback.directory, module().net), model.net)


def test_validating_and_testing_write_nothing(tmp_path: Path) -> None:
    callback, model = folding(), module()
    run = trainer(tmp_path, callback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="FoldCallback")
        run.validate(model, loader(), verbose=False)
        run.test(model, loader(), verbose=False)
    assert callback.result is None
    assert not list(tmp_path.rglob("folded*"))


def test_a_used_callback_can_be_pickled_without_the_model(tmp_path: Path) -> None:
    callback = FoldCallback("net", torch.randn(2, 6, WIDTH))
    fit(trainer(tmp_path, callback, ProgressiveNormCallback()), module())
    again = pickle.loads(pickle.dumps(callback))
    assert again.result is None
    assert again.directory == callback.directory
    assert len(pickle.dumps(callback)) < 20_000
