"""A run shows what happens to it while it happens, in any logger, and leaves a report beside its record."""

import logging
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stabnorm import Alert
from stabnorm.callbacks import FoldCallback, ProgressiveNormCallback, StabilityCallback
from stabnorm.monitor.record import read_record
from tests.lightning_small import fit, module, trainer


class AtStepSix:
    """A detector that raises one alert."""

    def __init__(self, statistics: Any, rows: Any, fading: Any = ()) -> None:
        self.layer, self.statistic = rows[0], statistics[0].name

    def update(self, first_step: int, values: Any, tokens: Any, nonfinite: Any) -> list[Alert]:
        reached = first_step <= 6 < first_step + len(values)
        return [Alert(6, self.layer, self.statistic, 2.0, 1.0, "because")] if reached else []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def run(tmp_path: Path, *callbacks: Any, alert: bool = False, logger: Any = False, **options: Any) -> StabilityCallback:
    detector = AtStepSix if alert else None
    stability = StabilityCallback(flush_every=4, mask="mask", detector=detector)
    fit(trainer(tmp_path, stability, *callbacks, logger=logger, **options), module())
    return stability


@pytest.mark.parametrize("logger", [False, "csv", "tensorboard"])
def test_a_report_lies_beside_every_record(logger: Any, tmp_path: Path) -> None:
    made = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
    stability = run(tmp_path, logger=made[logger](tmp_path) if logger else False)
    assert stability.directory is not None
    text = (stability.directory / "report.md").read_text(encoding="utf-8")
    assert "12 of 256 steps" in text
    if logger != "tensorboard":
        assert list(stability.directory.glob("stability_00_relative_map_*.png"))


def test_tensorboard_shows_the_map_first_and_the_text_of_the_alert(tmp_path: Path) -> None:
    stability = run(tmp_path, alert=True, logger=TensorBoardLogger(tmp_path))
    assert stability.monitor is not None
    assert [alert.step for alert in stability.monitor.alerts] == [6]
    (folder,) = (path.parent for path in tmp_path.rglob("*tfevents*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    assert sorted(events.Tags()["images"])[0] == "stability/00_relative_map"
    assert events.Images("stability/00_relative_map")[0].step == 7, "at the flush of the alert"
    (first, *_) = events.Tensors("stability/00_report/text_summary")
    assert stability.monitor.alerts[0].layer in first.tensor_proto.string_val[0].decode()


def test_a_run_that_is_killed_has_its_picture_and_text(tmp_path: Path) -> None:
    class Dead(BaseException):
        pass

    class Kill(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                files.extend(path.name for path in tmp_path.rglob("*") if path.is_file())
                raise Dead

    files: list[str] = []
    with pytest.raises(Dead):
        run(tmp_path, Kill(), alert=True)
    assert "report.md" in files
    assert any(name.startswith("stability_00_relative_map") for name in files)


def test_the_progress_bar_shows_the_verdict_and_is_given_back(tmp_path: Path) -> None:
    shown: list[str] = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            shown.append(str(self.get_metrics(trainer, pl_module).get("stability")))

    bar = Bar()
    run(tmp_path, bar, alert=True, enable_progress_bar=True)
    assert "alert" not in shown[0]
    assert "alert" in shown[-1]
    assert "get_metrics" not in vars(bar)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["stability", "fold"])
@pytest.mark.parametrize("logger", [False, True])
def test_the_record_says_where_each_norm_was_folded(first: str, logger: bool, tmp_path: Path) -> None:
    stability, fold = StabilityCallback(), FoldCallback("net", example=lambda batch: batch["x"])
    switch = ProgressiveNormCallback(schedule="linear")
    callbacks = [stability, switch, fold] if first == "stability" else [fold, switch, stability]
    log: Any = TensorBoardLogger(tmp_path) if logger else False
    fit(trainer(tmp_path, *callbacks, max_epochs=2, logger=log), module())
    assert stability.directory is not None
    record = read_record(stability.directory.parent if logger else stability.directory)
    (event,) = (event for event in record.events if event.kind == "fold_report")
    assert [norm["name"] for norm in event.data["norms"]] == ["net.1", "net.5"]
    assert all(norm["into"] for norm in event.data["norms"])


def test_a_logger_that_fails_costs_no_training(tmp_path: Path) -> None:
    class Broken(CSVLogger):
        def log_image(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("the server is down")

    stability = run(tmp_path, alert=True, logger=Broken(tmp_path))
    assert stability.monitor is not None
    assert stability.monitor.steps_done == 12


def test_the_closing_words_say_where_the_report_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "stabnorm"):
        stability = run(tmp_path)
    assert str(stability.directory) in caplog.text
    assert "report.md" in caplog.text
