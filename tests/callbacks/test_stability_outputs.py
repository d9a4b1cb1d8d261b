"""The outputs of the callback: the record, TensorBoard and other loggers, folders and addresses, the logged table."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

from stabnorm.callbacks import StabilityCallback, _outputs
from stabnorm.monitor.outputs import Guard
from stabnorm.monitor.record import FileRecord, TensorBoardRecord, read_record
from tests.lightning_padded import BATCHES, fit, loader, module, record_of, watched
from tests.lightning_small import trainer


def test_tensorboard_gets_few_scalars_pictures_and_the_table_and_the_record_lies_beside_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    callback = StabilityCallback(flush_every=5)
    fit(trainer(tmp_path, callback, logger=logger, log_every_n_steps=1), module())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags: Any = events.Tags()
    ours = [tag for tag in tags["scalars"] if tag.startswith("stability/")]
    assert 8 <= len(ours) <= 12
    assert [e.step for e in events.Scalars("stability/amax_worst")] == [4, 9, 11]
    assert {"stability/amax", "stability/token_std_mean"} <= set(tags["images"])
    assert "custom_scalars__config__" in tags["tensors"]
    assert "stability/closing_table/text_summary" in tags["tensors"]
    assert not [tag for tag in tags["tensors"] if tag.startswith("stabnorm/")]
    record = read_record(logger.log_dir)
    assert record.steps.tolist() == list(range(BATCHES))
    for name, values in watched(callback).history().items():
        torch.testing.assert_close(torch.from_numpy(record.series[name]), values, rtol=0, atol=0, equal_nan=True)
    assert record.series["loss"].shape == (BATCHES,)
    assert record.series["learning_rate"] == pytest.approx(0.05)


@pytest.mark.parametrize("which", ["csv", "none"])
def test_without_tensorboard_the_record_is_files(tmp_path: Path, which: str) -> None:
    callback = StabilityCallback(flush_every=5)
    logger = CSVLogger(tmp_path) if which == "csv" else False
    fit(trainer(tmp_path, callback, logger=logger), module())
    record = record_of(callback)
    assert record.steps.tolist() == list(range(BATCHES))
    assert record.layers == ("net.0", "net.3")
    assert callback.directory is not None
    assert any(path.name.startswith("stability_amax") for path in callback.directory.glob("*.png"))


def test_runs_without_a_logger_do_not_mix(tmp_path: Path) -> None:
    directories = set()
    for _ in range(2):
        callback = StabilityCallback()
        fit(trainer(tmp_path, callback), module())
        directories.add(callback.directory)
    assert len(directories) == 2


class LikeWandb(Logger):
    """Takes metrics and images, knows a directory, and is no TensorBoard."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory, self.images, self.metrics = directory, [], []  # type: ignore[var-annotated]

    name, version, experiment = "like", "0", None

    @property
    def save_dir(self) -> str:
        return str(self.directory)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, metrics))

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.images.append((key, step))


def test_a_logger_like_wandb_gets_metrics_and_images(tmp_path: Path) -> None:
    logger = LikeWandb(tmp_path)
    fit(trainer(tmp_path, StabilityCallback(), logger=logger), module())
    assert ("stability/amax", BATCHES - 1) in logger.images
    ours = [metrics for _, metrics in logger.metrics if any(key.startswith("stability/") for key in metrics)]
    assert len(ours) == 1
    assert read_record(tmp_path / "stabnorm_logs" / "run_0").steps.tolist() == list(range(BATCHES))


def test_runs_of_a_logger_with_a_shared_folder_do_not_mix(tmp_path: Path) -> None:
    for run in range(2):
        fit(trainer(tmp_path, StabilityCallback(), logger=LikeWandb(tmp_path)), module())
        assert read_record(tmp_path / "stabnorm_logs" / f"run_{run}").steps.tolist() == list(range(BATCHES))


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    callback = StabilityCallback()
    fit(trainer(tmp_path, callback, fast_dev_run=2, logger=TensorBoardLogger(tmp_path)), module())
    assert watched(callback).history()["amax"].shape == (2, 2)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(("folder", "kind"), [("s3://bucket/run", TensorBoardRecord), ("{}/run", FileRecord)])
def test_the_record_is_in_the_event_file_only_where_tensorboard_writes_to_another_machine(
    folder: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SimpleNamespace(log_dir=folder.format(tmp_path))
    monkeypatch.setattr(_outputs, "summary_writers", lambda *_: [writer])
    (record,) = _outputs.record_writers(trainer(tmp_path), Guard(), tmp_path / "stabnorm_logs")
    assert type(record) is kind


@pytest.mark.parametrize("root", ["memory://runs", "file://{}/runs"])
def test_a_root_that_is_an_address_is_a_folder_of_this_machine_or_there_is_a_warning(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    callback = StabilityCallback()
    run = trainer(tmp_path, callback, default_root_dir=root.format(tmp_path))
    if root.startswith("memory"):
        with pytest.warns(UserWarning, match="memory://runs is not a folder of this machine"):
            run.fit(module(), loader())
        assert callback.directory == tmp_path / "stabnorm_logs" / "run_0"
    else:
        fit(run, module())
        assert callback.directory == tmp_path / "runs" / "stabnorm_logs" / "run_0"
    assert read_record(callback.directory).steps.tolist() == list(range(BATCHES))
    assert not list(tmp_path.glob("*:*"))


def test_the_closing_table_and_the_cost_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(trainer(tmp_path, StabilityCallback()), module())
    printed = caplog.text
    assert "12 steps" in printed
    assert "monitoring cost" in printed
    assert "ms per step" in printed
