"""The switch beside other callbacks, loggers and loops: one monitor, one record, copies of the model, exceptions."""

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from stabnorm.callbacks import ProgressiveNormCallback, StabilityCallback
from stabnorm.errors import StabNormError
from stabnorm.monitor.record import Record, read_record
from stabnorm.nn import PRepBN, RepBN
from stabnorm.switch.lam import progressive_norms
from tests.lightning_small import BATCHES, fit, loader, module, trainer
from tests.versions import needs_weight_averaging
from tests.watchers import watchers

LinearSwitch = functools.partial(ProgressiveNormCallback, schedule="linear")  # whose lam is known beforehand


def run_with(tmp_path: Path, *callbacks: Any, **options: Any) -> tuple[Any, Record]:
    model = module(heavy=True)
    logger = TensorBoardLogger(tmp_path, name=str(len(list(tmp_path.iterdir()))))
    fit(trainer(tmp_path, *callbacks, logger=logger, max_epochs=4, **options), model)
    return model, read_record(logger.log_dir)


def check_record(model: Any, record: Record) -> None:
    ours = [record.layers.index(name) for name in progressive_norms(model)]
    assert record.steps.tolist() == list(range(4 * BATCHES))
    np.testing.assert_allclose(record.series["lam"][:, ours], np.array(model.lams), rtol=0, atol=1e-7)
    gap = record.series["branch_gap"][:, ours]
    measured = np.flatnonzero(np.isfinite(gap).all(1))
    assert measured.tolist() == list(range(0, 4 * BATCHES, 4))
    assert (gap[measured] > 0).all()
    others = [i for i in range(len(record.layers)) if i not in ours]
    assert np.isnan(record.series["lam"][:, others]).all()


@pytest.mark.slow
def test_alone_or_beside_the_monitor_in_either_order_the_run_and_the_record_are_the_same(tmp_path: Path) -> None:
    outcomes = []
    for order in ("alone", "first", "second"):
        switch = ProgressiveNormCallback(schedule="adaptive")
        callbacks: dict[str, list[Any]] = {
            "alone": [switch],
            "first": [switch, StabilityCallback()],
            "second": [StabilityCallback(), switch],
        }
        model, record = run_with(tmp_path, *callbacks[order])
        check_record(model, record)
        assert ("affine_residual" in record.series) == (order != "alone")
        decisions = [event.data for event in record.events if event.kind == "hold"]
        assert [(d["layer"], d["state"]) for d in decisions] == [("net.1", "run"), ("net.5", "refused")]
        assert decisions[1]["reason"].endswith("keeps its norm")
        outcomes.append(
            (model.lams, model.losses, [event.data["reason"] for event in record.events if event.kind == "hold"])
        )
        assert watchers(model) == 0
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert model.lam() == [0.0, 1.0]


@pytest.mark.slow
def test_a_norm_that_fades_raises_no_alert(tmp_path: Path) -> None:
    watch = StabilityCallback()
    options: dict[str, Any] = dict(max_steps=400, max_epochs=-1, val_check_interval=1.0)
    fit(trainer(tmp_path, LinearSwitch(), watch, **options), module())
    assert watch.monitor is not None
    assert [alert for alert in watch.monitor.alerts if alert.statistic.startswith("grad")] == []


@pytest.mark.slow
def test_there_is_one_monitor_where_one_will_do(tmp_path: Path) -> None:
    switch, watch = ProgressiveNormCallback(schedule="adaptive"), StabilityCallback()
    fit(trainer(tmp_path, switch, watch), module())
    assert switch.switch is not None
    assert switch.switch._monitor is None
    narrow = StabilityCallback(include=r"net\.1")
    model, record = run_with(tmp_path, switch, narrow)
    check_record(model, record)  # the record has the layers of both
    assert switch.switch._monitor is not None
    assert set(record.layers) == {"net.1", "net.5"}


def test_the_headline_is_not_disturbed_and_the_mean_lam_is_a_scalar(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with(tmp_path, LinearSwitch(), StabilityCallback(flush_every=50))
    events = EventAccumulator(str(next(tmp_path.glob("*/version_0"))))
    events.Reload()
    assert [event.step for event in events.Scalars("stability/amax_worst")] == [4 * BATCHES - 1]
    assert not np.isnan(events.Scalars("stability/amax_worst")[0].value)
    assert [(event.step, event.value) for event in events.Scalars("stability/lam")] == [(4 * BATCHES - 1, 0.0)]
    tags: Any = events.Tags()
    assert "stability/switch/text_summary" in tags["tensors"]


def test_without_a_logger_the_record_is_files(tmp_path: Path) -> None:
    model = module()
    fit(trainer(tmp_path, LinearSwitch()), model)
    record = read_record(tmp_path / "stabnorm_logs" / "run_0")
    np.testing.assert_allclose(record.series["lam"], model.lams, rtol=0, atol=1e-7)
    logger = CSVLogger(tmp_path)
    fit(trainer(tmp_path, LinearSwitch(), logger=logger), module())
    assert read_record(Path(logger.log_dir) / "stabnorm_logs").steps.tolist() == list(range(BATCHES))


def test_fast_dev_run_goes_through_the_switch_and_writes_nothing(tmp_path: Path) -> None:
    for callback in (
        LinearSwitch(start=1000),
        ProgressiveNormCallback(schedule=lambda step: max(0.0, 1 - step / 1000)),
        ProgressiveNormCallback(schedule="adaptive"),
    ):
        model = module()
        fit(trainer(tmp_path, callback, fast_dev_run=3), model)
        assert len(model.lams) == 3
    assert list(tmp_path.rglob("*")) == []


def test_an_exception_leaves_no_trace_but_the_converted_norms_and_keeps_the_record(tmp_path: Path) -> None:
    for callbacks in (
        [ProgressiveNormCallback("prepbn", "adaptive")],
        [StabilityCallback(), LinearSwitch()],
    ):
        model = module(poison=7)
        with pytest.raises(RuntimeError, match="boom"):
            fit(trainer(tmp_path, *callbacks), model)
        assert watchers(model) == 0
        assert "configure_model" not in vars(model)
        (record,) = (read_record(path) for path in sorted((tmp_path / "stabnorm_logs").glob("run_*"))[-1:])
        assert record.series["lam"].shape == (7, 2)
        fit(trainer(tmp_path, LinearSwitch()), module())  # the same callback class, another run


@needs_weight_averaging
def test_callbacks_that_copy_the_model_come_after(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

    for copying in (WeightAveraging(), EMAWeightAveraging(), StochasticWeightAveraging(1e-2)):
        with pytest.raises(StabNormError, match=f"{type(copying).__name__} stands before ProgressiveNormCallback"):
            fit(trainer(tmp_path, copying, LinearSwitch()), module())


def test_a_home_made_average_before_it_is_noticed(tmp_path: Path) -> None:
    import copy

    import pytorch_lightning

    class Average(pytorch_lightning.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.average = copy.deepcopy(pl_module)

    with pytest.raises(StabNormError, match="Average stands before ProgressiveNormCallback"):
        fit(trainer(tmp_path, Average(), LinearSwitch()), module())
    after = Average()
    fit(trainer(tmp_path, LinearSwitch(), after), module())
    assert progressive_norms(after.average)
    after.average.configure_model()  # its own, whatever stood there when it was copied
    assert list(progressive_norms(after.average)) == ["net.1", "net.5"]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize("place", ["init", "configure_model"])
@needs_weight_averaging
def test_averaged_weights_end_at_lam_0_and_resume(tmp_path: Path, place: str) -> None:
    from pytorch_lightning.callbacks import EMAWeightAveraging

    model = module(place=place)
    run = trainer(tmp_path, LinearSwitch(), EMAWeightAveraging(decay=0.8), max_epochs=2)
    fit(run, model)
    assert model.lam() == [0.0, 0.0]
    for norm in progressive_norms(model).values():
        norm.fold_affine()
    assert model.losses[-1] < model.losses[0]


def test_a_learning_rate_search_does_not_move_lam(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import LearningRateFinder

    model = module(lr=0.01)
    fit(trainer(tmp_path, LinearSwitch(), LearningRateFinder(num_training_steps=5)), model)
    assert model.at[-BATCHES:] == list(range(BATCHES))
    assert model.lams[-BATCHES] == [1.0, 1.0]
    assert model.lam() == [0.0, 0.0]
    assert watchers(model) == 0


def test_padding_does_not_reach_the_statistics(tmp_path: Path) -> None:
    for mask in ("mask", lambda batch: batch["mask"]):
        model = module(clean=False)
        fit(trainer(tmp_path, LinearSwitch(mask=mask)), model)
        for norm in progressive_norms(model).values():
            assert isinstance(norm.rep, RepBN)
            assert norm.rep.running_mean is not None
            assert norm.rep.running_mean.abs().max() < 100


def test_validate_test_and_predict_alone_take_converted_checkpoints_and_models_without_norms(tmp_path: Path) -> None:
    model = module()
    run = trainer(tmp_path, LinearSwitch())
    fit(run, model)
    run.save_checkpoint(tmp_path / "done.ckpt")
    fresh, bare = module(), module()
    bare.net = nn.Sequential(nn.Linear(24, 24))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, LinearSwitch()).test(fresh, loader(), ckpt_path=tmp_path / "done.ckpt", verbose=False)
        assert isinstance(fresh.net[1], PRepBN)
        assert "configure_model" not in vars(fresh)
        for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        trainer(tmp_path, LinearSwitch()).validate(bare, loader(), verbose=False)
    assert watchers(bare) == 0


def test_a_user_who_converts_by_hand_gets_the_same_run(tmp_path: Path) -> None:
    from stabnorm import convert_norms

    by_hand, by_itself = module(), module()
    convert_norms(by_hand)
    for model in (by_hand, by_itself):
        fit(trainer(tmp_path, LinearSwitch()), model)
    assert by_hand.losses == by_itself.losses


def test_up_to_the_start_the_run_is_the_layernorm_run_bit_for_bit(tmp_path: Path) -> None:
    plain, switched = module(), module()
    fit(trainer(tmp_path), plain)
    fit(trainer(tmp_path, LinearSwitch(start=6, fraction=0.5)), switched)
    assert switched.losses[:7] == plain.losses[:7]
    assert switched.losses[7] != plain.losses[7]


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", [[], [StabilityCallback()]], ids=["alone", "with the monitor"])
def test_a_compiled_model_that_has_run_before_is_switched_and_measured(tmp_path: Path, callbacks: list[Any]) -> None:
    torch._dynamo.reset()
    eager, model = module(heavy=True), module(heavy=True)
    compiled: Any = torch.compile(model.net, backend="eager")
    compiled(torch.randn(4, 6, 24))
    model.net = compiled
    outcomes = []
    for made in (eager, model):
        switch = ProgressiveNormCallback(schedule="adaptive")
        fit(trainer(tmp_path, switch, *callbacks, max_epochs=4), made)
        assert switch.switch is not None
        assert switch.switch.gate is not None
        outcomes.append((switch.switch.layers, switch.switch.gate.residuals, made.lams))
    assert outcomes[0][0] == outcomes[1][0] == ("net.1", "net.5")
    assert outcomes[0][2] == outcomes[1][2]
    np.testing.assert_allclose(outcomes[0][1], outcomes[1][1], rtol=1e-5)
    assert model.lam() == [0.0, 1.0]
