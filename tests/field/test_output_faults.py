"""What writes, draws or logs may fail in any way: the training goes on, and what could not be written is not lost."""

import errno
import itertools
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import Logger
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from stabnorm import StabilityMonitor
from stabnorm.callbacks import FoldCallback, ProgressiveNormCallback, StabilityCallback
from stabnorm.monitor import FileRecord, TensorBoardRecord, outputs, read_record
from stabnorm.monitor.record import Block
from tests.lightning_padded import BATCHES, fit, module
from tests.lightning_small import fit as fit_small
from tests.lightning_small import module as small_module
from tests.lightning_small import trainer

FULL = OSError(errno.ENOSPC, "No space left on device")


class Keeper:
    """A writer that keeps what it gets, unless it is broken."""

    def __init__(self) -> None:
        self.broken = False
        self.steps: list[int] = []
        self.of_companions: list[int] = []
        self.events: list[int] = []

    def write_block(self, block: Block) -> None:
        if self.broken:
            raise FULL
        steps = self.of_companions if block.companion else self.steps
        steps += range(block.first_step, block.last_step + 1)

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        if self.broken:
            raise FULL
        self.events.append(step)

    def close(self) -> None:
        if self.broken:
            raise FULL


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def run(model: nn.Module, monitor: StabilityMonitor, steps: int, at: Mapping[int, Any] | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        if at and step in at:
            at[step]()
        optimizer.zero_grad()
        model(torch.randn(9, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        monitor.step()


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was complained about, each of which is one line; the closing words are no complaint."""
    ours = (record for record in caplog.records if record.name == "stabnorm" and record.levelno >= logging.WARNING)
    said = [record.getMessage() for record in ours]
    assert not any("\n" in message for message in said)
    return said


def test_a_writer_that_fails_keeps_nothing_from_the_others_and_catches_up(caplog: pytest.LogCaptureFixture) -> None:
    model, broken, healthy = net(), Keeper(), Keeper()
    monitor = StabilityMonitor(model, flush_every=5, companions=["weights"])
    monitor.records += [broken, healthy]

    def set_broken(value: bool) -> None:
        broken.broken = value

    with monitor:
        run(model, monitor, 40, {8: lambda: set_broken(True), 32: lambda: set_broken(False)})
        assert healthy.steps == healthy.of_companions == list(range(40))
    assert broken.steps == broken.of_companions == list(range(40))
    (said,) = complaints(caplog)
    assert "Keeper cannot write; the training goes on" in said
    assert "[Errno 28] No space left on device" in said


def test_what_can_never_be_written_keeps_no_later_block_waiting(caplog: pytest.LogCaptureFixture) -> None:
    class Picky(Keeper):
        def write_block(self, block: Block) -> None:
            if block.first_step in (5, 10):
                raise TypeError("not this one")
            super().write_block(block)

        def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
            raise NotImplementedError

    model, picky = net(), Picky()
    monitor = StabilityMonitor(model, flush_every=5)
    monitor.records.append(picky)
    with monitor:
        run(model, monitor, 30)
        monitor.outputs.write_event(monitor.records, "alert", 3, {})
        run(model, monitor, 10)
        assert monitor.outputs._deliveries[0].waiting == 3
        run(model, monitor, 100)
    assert sorted(picky.steps) == [*range(5), *range(15, 140)]
    assert monitor.outputs._deliveries[0].waiting == 1  # the event, and no other one was ever taken
    assert ["cannot write" in said or "refused 10 times" in said for said in complaints(caplog)] == [True, True]


def test_what_waits_is_bounded_and_what_is_given_up_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "_MOST_BYTES", 4 * 100)
    guarded, broken = outputs.Outputs(), Keeper()
    broken.broken = True
    for step in range(0, 200, 20):
        guarded.write_block([broken], Block(step, (), {"loss": np.zeros(20, np.float32)}))
    broken.broken = False
    guarded.close([broken])
    assert broken.steps == list(range(100, 200))  # the last hundred numbers
    assert ["cannot write" in said or "given up" in said for said in complaints(caplog)] == [True, True]
    broken.broken = True
    guarded.write_block([broken], Block(0, (), {"loss": np.zeros(20, np.float32)}))
    guarded.close([broken])
    assert "Keeper has not taken 1 blocks and events" in complaints(caplog)[-1]


@pytest.mark.parametrize("fault", ["full disk", "folder swept away", "folder without rights"])
def test_files_that_cannot_be_written_end_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    model, folder = net(), tmp_path / "record"
    monitor = StabilityMonitor(model, flush_every=5)
    monitor.records.append(FileRecord(folder))

    def begin() -> None:
        if fault == "full disk":
            monkeypatch.setattr("os.fsync", raise_full)
        elif fault == "folder swept away":
            shutil.rmtree(folder)
        else:
            monkeypatch.setattr(Path, "open", raise_full)

    def raise_full(*_: Any, **__: Any) -> None:
        raise FULL

    with monitor:
        run(model, monitor, 30, {12: begin, 22: monkeypatch.undo})
    swept = fault == "folder swept away"
    assert read_record(folder).steps.tolist() == list(range(10 if swept else 0, 30))
    assert len(complaints(caplog)) == (not swept)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_tensorboard_writer_that_broke_is_followed_by_another_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    monitor = StabilityMonitor(model, flush_every=5)
    with SummaryWriter(str(tmp_path)) as writer:
        monitor.records.append(TensorBoardRecord(writer))

        def break_file() -> None:
            writer._get_file_writer().event_writer._async_writer._writer.close()

        with monitor:
            run(model, monitor, 30, {12: break_file})
    assert read_record(tmp_path).steps.tolist() == list(range(30))
    assert len(list(tmp_path.glob("*tfevents*"))) == 2
    assert len(complaints(caplog)) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("the user's own"), GeneratorExit])
def test_the_end_of_the_context_never_replaces_the_users_error(error: Any) -> None:
    model, broken = net(), Keeper()
    monitor = StabilityMonitor(model)
    monitor.records.append(broken)
    broken.broken = True

    def flush() -> None:
        raise RuntimeError("a device-side assert")

    with pytest.raises(error if isinstance(error, type) else ValueError) as caught, monitor:  # noqa: PT012
        run(model, monitor, 3)
        monitor.flush = flush  # type: ignore[method-assign]
        raise error
    assert caught.value.__context__ is None
    assert not model[1]._forward_pre_hooks  # type: ignore[index]


def test_a_detector_or_a_log_handler_that_fails_ends_no_training(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __init__(self, statistics: Any, rows: Any, fading: Any = ()) -> None: ...

        def update(self, *_: Any) -> Any:
            raise ZeroDivisionError("in the user's own detector")

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    class Pager(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise ConnectionError("the pager is down")

    model, keeper = net(), Keeper()
    monitor = StabilityMonitor(model, flush_every=5, detector=Broken)
    monitor.records.append(keeper)
    pager = Pager()
    logging.getLogger("stabnorm").addHandler(pager)
    try:
        with monitor:
            run(model, monitor, 20)
    finally:
        logging.getLogger("stabnorm").removeHandler(pager)
    assert keeper.steps == list(range(20))


class Unreliable(Logger):
    """A logger that fails wherever it is told to."""

    def __init__(self, directory: Path, broken: str) -> None:
        super().__init__()
        self.directory, self.broken, self.metrics = directory, broken, []  # type: ignore[var-annotated]

    name, version = "unreliable", "0"

    @property
    def experiment(self) -> None:
        return None

    @property
    def save_dir(self) -> str:
        return str(self.directory)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        ours = any(key.startswith("stability") for key in metrics)
        if ours and self.broken == "log_metrics":
            raise ConnectionError("the server\nis down")
        if ours:
            self.metrics.append(step)

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        if self.broken == "log_image":
            raise ConnectionError("the server\nis down")


@pytest.mark.parametrize("broken", ["log_metrics", "log_image"])
def test_a_logger_that_raises_costs_neither_the_training_nor_its_checkpoint(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    callback = StabilityCallback(flush_every=3)
    loggers = [Unreliable(tmp_path, broken), Unreliable(tmp_path, "")]
    keep = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    fit(trainer(tmp_path, callback, keep, logger=loggers, enable_checkpointing=True), module())
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert loggers[1].metrics == list(range(2, BATCHES, 3))
    assert callback.directory is not None
    assert read_record(callback.directory).steps.tolist() == list(range(BATCHES))
    told = [said for said in complaints(caplog) if "ConnectionError: the server is down" in said]
    assert len(told) == 1
    assert "Unreliable" in told[0]


@pytest.mark.parametrize("part", ["heatmap", "layers_worth_a_look", "log_text", "format_table"])
def test_a_closing_report_that_fails_ends_no_fit(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("load_default() takes 0 positional arguments but 1 was given")

    monkeypatch.setattr(f"stabnorm.callbacks._closing.{part}", fail)
    after: list[str] = []

    class After(ModelCheckpoint):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            after.append("on_train_end")

    callback = StabilityCallback()
    fit(trainer(tmp_path, callback, After(tmp_path), enable_checkpointing=True), module())
    assert after == ["on_train_end"]
    assert callback.directory is not None
    assert read_record(callback.directory).steps.tolist() == list(range(BATCHES))
    told = [said for said in complaints(caplog) if "load_default() takes 0" in said]
    assert told
    assert len(told) == len(set(told))


def test_a_folder_that_cannot_be_made_ends_no_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "stabnorm_logs").write_text("a file stands in the way")
    callback = StabilityCallback()
    fit(trainer(tmp_path, callback), module())
    assert callback.monitor is not None
    assert len(callback.monitor.history_steps()) == BATCHES
    assert any("no record is written, because that is impossible in" in said for said in complaints(caplog))


def test_a_disk_that_fills_up_in_a_switch_costs_neither_the_switch_nor_the_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise FULL

    class Forgetful(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if "stability/lam" in metrics:
                raise FULL
            super().log_metrics(metrics, step)

    monkeypatch.setattr("stabnorm.monitor.record.create_file", full)
    switch, fold = ProgressiveNormCallback(schedule="linear"), FoldCallback("net", example=lambda batch: batch["x"])
    model = small_module()
    fit_small(trainer(tmp_path, switch, fold, logger=Forgetful(tmp_path), max_epochs=2), model)
    assert fold.result is not None
    assert model.lam() == [0.0, 0.0]
    assert any("FileRecord cannot write" in said for said in complaints(caplog))
    assert any("Forgetful does not take lam" in said for said in complaints(caplog))


def test_a_picture_of_an_alert_that_fails_keeps_each_block_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("load_default() takes 0 positional arguments but 1 was given")

    for part in ("relative_map", "markdown_report", "EVERY"):
        monkeypatch.setattr(f"stabnorm.dashboard.live.{part}", 2 if part == "EVERY" else fail)
    monkeypatch.setattr("stabnorm.callbacks._live.short_verdict", fail)
    callback, model = StabilityCallback(flush_every=2), module()
    with torch.no_grad():
        model.net[1].weight[0, 0] = torch.nan
    run = trainer(tmp_path, callback, enable_progress_bar=True, log_every_n_steps=1)
    fit(run, model)
    assert callback.monitor is not None
    assert callback.monitor.alerts
    assert callback._live is not None
    kept = [block.first_step for block in callback._live.writer._blocks]
    assert kept == list(range(0, BATCHES, 2))
    told = [said for said in complaints(caplog) if "load_default() takes 0" in said]
    assert len(told) == len(set(told)) >= 3


@pytest.mark.parametrize(
    "folder", [5, b"runs", ["runs"], object(), float("nan")], ids=lambda folder: type(folder).__name__
)
def test_a_logger_whose_folder_is_neither_text_nor_path_ends_no_fit(tmp_path: Path, folder: Any) -> None:
    class Odd(Unreliable):
        save_dir = folder

    callback = StabilityCallback()
    fit(trainer(tmp_path, callback, logger=Odd(tmp_path, "")), module())
    assert callback.monitor is not None
    assert len(callback.monitor.history_steps()) == BATCHES


@pytest.mark.parametrize("good", [0, 1])
def test_renaming_that_fails_every_other_time_is_said_and_costs_no_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, good: int
) -> None:
    calls, replace = itertools.count(), os.replace

    def flaky(*args: Any) -> None:
        if next(calls) % 2 != good:
            raise OSError(errno.EIO, "the disk has hiccups")
        replace(*args)

    monkeypatch.setattr(os, "replace", flaky)
    callback = StabilityCallback(flush_every=4)
    fit(trainer(tmp_path, callback), module())
    record = read_record(next(tmp_path.rglob("block-*.npz")).parent)
    assert len(record.steps) == BATCHES
    if not good:
        return
    assert [said for said in complaints(caplog) if "hiccups" in said]
