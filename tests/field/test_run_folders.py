"""One folder for each run, which no import of the package can find, and which is named at the end."""

from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from stabnorm.callbacks import FoldCallback, ProgressiveNormCallback, StabilityCallback
from stabnorm.monitor import FileRecord, read_record
from stabnorm.monitor.record import Block
from tests.lightning_small import BATCHES, fit, module, trainer


def callbacks() -> tuple[StabilityCallback, ProgressiveNormCallback, FoldCallback]:
    switch = ProgressiveNormCallback(schedule="linear")
    return StabilityCallback(flush_every=5), switch, FoldCallback("net", example=lambda batch: batch["x"])


def logger(which: str, folder: Path) -> Any:
    made = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
    return made[which](folder) if which in made else CSVLogger(".", name="", version="") if which == "here" else False


@pytest.mark.parametrize(
    ("which", "order"), [("none", (0, 1, 2)), ("csv", (2, 1, 0)), ("tensorboard", (1, 0, 2)), ("here", (2, 0, 1))]
)
def test_a_run_has_one_folder_for_record_pictures_and_folded_model_and_names_it(
    tmp_path: Path,
    which: str,
    order: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = callbacks()
    stability, _, fold = ours
    fit(trainer(tmp_path, *(ours[i] for i in order), logger=logger(which, tmp_path), max_epochs=2), module())
    assert stability.directory is not None
    assert stability.directory == fold.directory
    names = {path.name for path in stability.directory.iterdir()}
    assert {"folded.pt", "folded_manifest.json", "folded_report.txt"} <= names
    assert "record.json" in names
    assert len(list(tmp_path.rglob("stabnorm_logs"))) == 1
    assert not list(tmp_path.rglob("stabnorm"))
    assert "record and pictures are in" in caplog.text
    assert str(stability.directory) in caplog.text


@pytest.mark.parametrize("which", ["none", "here"])
def test_no_folder_that_is_written_shadows_the_package(
    tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(trainer(Path("."), StabilityCallback(), logger=logger(which, Path("."))), module())
    assert list(tmp_path.rglob("record.json"))
    # After an editable installation Python asks the path first, and there a folder is enough to be a package.
    assert PathFinder.find_spec("stabnorm", [str(tmp_path)]) is None
    (tmp_path / "stabnorm").mkdir()
    assert PathFinder.find_spec("stabnorm", [str(tmp_path)]) is not None


@pytest.mark.slow
def test_each_fit_that_begins_anew_has_a_folder_of_its_own_and_one_that_goes_on_keeps_it(tmp_path: Path) -> None:
    stability, _, fold = callbacks()
    folders = []
    for _ in range(2):
        run, model = trainer(tmp_path, stability, fold, ProgressiveNormCallback(schedule="linear")), module()
        fit(run, model)
        folders.append((stability.directory, fold.directory))
    run.fit_loop.max_epochs = 2
    fit(run, model)
    folders.append((stability.directory, fold.directory))
    runs = tmp_path / "stabnorm_logs"
    assert folders == [
        (runs / "run_0", runs / "run_0"),
        (runs / "run_1", runs / "run_1"),
        (runs / "run_1", runs / "run_1"),
    ]
    assert read_record(runs / "run_1").steps.tolist() == list(range(2 * BATCHES))


def test_a_folder_that_another_process_has_just_taken_is_left_to_it(tmp_path: Path) -> None:
    taken = tmp_path / "stabnorm_logs"
    for name in ("run_0", "run_3", "run_x"):
        (taken / name).mkdir(parents=True)
    callback = StabilityCallback()
    fit(trainer(tmp_path, callback), module())
    assert callback.directory == taken / "run_4"


@pytest.mark.parametrize("name", ["stabnorm_logs", "stabnorm"])
def test_a_record_is_found_in_the_folder_that_holds_ours_under_its_first_name_too(tmp_path: Path, name: str) -> None:
    FileRecord(tmp_path / name).write_block(Block(0, ("a",), {"amax": [[1.0]]}))  # type: ignore[dict-item]
    assert read_record(tmp_path).steps.tolist() == [0]
