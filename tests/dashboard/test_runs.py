"""Runs are found and read while they grow, whatever state their files are in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabnorm.dashboard.runs import Run, open_run, run_folders
from stabnorm.monitor._folders import FOLDER
from stabnorm.monitor.record import FileRecord, read_record
from tests.dashboard.records import LAYERS, alert, calm, event_record, file_record, write

WRITERS = [file_record, event_record]


def read(folder: Path) -> Run:
    run = open_run("run", folder)
    run.refresh()
    return run


@pytest.mark.parametrize("record", WRITERS)
def test_a_run_is_read_as_read_record_reads_it(record: Any, tmp_path: Path) -> None:
    folder = record(tmp_path / "run", calm(130), events=[alert(100, "norm")])
    run, whole = read(folder), read_record(folder)
    assert run.rows().layers == whole.layers
    np.testing.assert_array_equal(run.rows().steps, whole.steps)
    for name, values in whole.series.items():
        np.testing.assert_array_equal(run.series(name), values)
    assert run.events == whole.events
    assert not run.notes


@pytest.mark.parametrize("record", WRITERS)
def test_only_what_is_new_is_read_again(record: Any, tmp_path: Path) -> None:
    folder = record(tmp_path / "run", calm(100))
    run = read(folder)
    assert not run.refresh()
    record(folder, calm(50), first=100, events=[alert(120, "norm")])
    assert run.refresh()
    assert len(run.rows().steps) == 150
    assert [event.step for event in run.events] == [120]
    assert run.version == 2


@pytest.mark.parametrize("record", WRITERS)
def test_steps_written_twice_are_shown_once_and_said(record: Any, tmp_path: Path) -> None:
    folder = record(tmp_path / "run", calm(150))
    later = calm(100, seed=1)
    record(folder, later, first=100)
    run = read(folder)
    assert len(run.rows().steps) == 200
    series = run.series("token_std_mean")
    assert series is not None
    np.testing.assert_array_equal(series[100:], later.astype(np.float32))
    assert any("written again" in note and "100" in note for note in run.notes)


@pytest.mark.parametrize("record", WRITERS)
def test_layers_may_come_and_go(record: Any, tmp_path: Path) -> None:
    folder = record(tmp_path / "run", calm(100))
    record(folder, calm(50, 3), first=100, layers=("norm", "new.1", "new.2"))
    run = read(folder)
    assert run.rows().layers == (*LAYERS, "new.1", "new.2")
    series = run.series("token_std_mean")
    assert series is not None
    assert np.isnan(series[100:, 0]).all()
    assert np.isnan(series[:100, -1]).all()
    assert not np.isnan(series[:, LAYERS.index("norm")]).any()
    assert any("2 layers are new and 8 are gone" in note for note in run.notes)


def test_missing_steps_are_said(tmp_path: Path) -> None:
    record = FileRecord(tmp_path)
    write(record, calm(50))
    write(record, calm(50), first=80)
    record.close()
    assert any("Steps 50 to 79 are missing" in note for note in read(tmp_path).notes)


def test_an_event_file_cut_short_is_read_up_to_there(tmp_path: Path) -> None:
    folder = event_record(tmp_path / "run", calm(200))
    (path,) = folder.glob("*tfevents*")
    whole = path.read_bytes()
    for size in range(0, len(whole), 7_919):
        path.write_bytes(whole[:size])
        steps = read(folder).rows().steps
        assert len(steps) in (0, 50, 100, 150, 200)
    path.write_bytes(whole[:-100])
    run = read(folder)
    path.write_bytes(whole)  # it was only not written yet
    run.refresh()
    assert len(run.rows().steps) == 200


def test_flipped_bits_spoil_no_more_than_what_they_hit(tmp_path: Path) -> None:
    folder = event_record(tmp_path / "run", calm(200))
    (path,) = folder.glob("*tfevents*")
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    right = {name: read(folder).series(name) for name in read(folder).statistics()}
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        run = read(folder)
        assert len(run.notes) == 1
        for name, values in right.items():
            series = run.series(name)
            if series is not None and values is not None:
                at = run.rows().steps
                assert (np.isnan(series) | (series == values[at])).all()  # left out, but never another figure


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half", bytes(5_000)])
def test_a_damaged_block_is_left_out_and_said(damage: bytes, tmp_path: Path) -> None:
    file_record(tmp_path, calm(150), events=[alert(100, "norm")])
    blocks = sorted(tmp_path.glob("block-*.npz"))
    blocks[1].write_bytes(damage)
    with (tmp_path / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write("no json\n{half a li")
    run = read(tmp_path)
    assert len(run.rows().steps) == 100
    assert sum("damaged" in note for note in run.notes) == 2
    assert len(run.events) == 1


def test_runs_are_found_below_a_folder_by_either_kind_of_record(tmp_path: Path) -> None:
    event_record(tmp_path / "a" / "version_0", calm(50))
    file_record(tmp_path / "b" / "version_0" / "stabnorm", calm(50))
    assert set(run_folders(tmp_path)) == {"a/version_0", "b/version_0"}
    assert set(run_folders(tmp_path / "a")) == set(run_folders(tmp_path / "a" / "version_0")) == {"a/version_0"}


def test_event_files_without_a_record_are_no_run(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("val/accuracy", 0.5, 3)
    assert not read(tmp_path)


def test_scalars_of_validation_are_kept(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    event_record(tmp_path, calm(50))
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("val/accuracy", 0.5, 30)
        writer.add_scalar("train/loss", 0.5, 30)
    assert read(tmp_path).validation == {"val/accuracy": {30: 0.5}}


def test_scalars_of_validation_beside_the_files_of_a_record_are_found(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer.add_scalar("val/accuracy", 0.5, 40)
    file_record(tmp_path / "run" / FOLDER, calm(100))
    ((name, folder),) = run_folders(tmp_path).items()
    run = open_run(name, folder)
    run.refresh()
    assert name == "run"
    outer = read(tmp_path / "run")  # the same by the run's own folder
    assert (outer.validation, len(outer.rows().steps)) == (run.validation, 100)
    assert run.validation == {"val/accuracy": {40: 0.5}}
    assert len(run.rows().steps) == 100


def test_a_record_that_began_in_an_event_file_goes_on_in_files(tmp_path: Path) -> None:
    scale = calm(200)
    event_record(tmp_path / "run", scale[:120], events=[alert(50, LAYERS[0])])
    file_record(tmp_path / "run" / FOLDER, scale[100:], first=100, events=[alert(150, LAYERS[1])])
    ((name, folder),) = run_folders(tmp_path).items()
    run = open_run(name, folder)
    run.refresh()
    record = read_record(tmp_path / "run")
    assert run.rows().steps.tolist() == record.steps.tolist() == list(range(200))
    np.testing.assert_allclose(record.series["token_std_mean"], scale, rtol=1e-6)
    shown = run.series("token_std_mean")
    assert shown is not None
    np.testing.assert_allclose(shown, scale, rtol=1e-6)
    assert [event.step for event in run.events] == [event.step for event in record.events] == [50, 150]
