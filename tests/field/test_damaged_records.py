"""A record that a disk, a kill or somebody's hand has damaged: what is left is read right, and what is lost is said."""

import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from stabnorm.monitor import FileRecord, Record, TensorBoardRecord, read_record
from stabnorm.monitor._event_files import crc32c, events_of, framed
from stabnorm.monitor.record import Block

BLOCKS, STEPS = 10, 5
LAYERS = ("a", "b")
DAMAGES = {"one bit": 1, "a sector of zeros": 512}


def block(number: int) -> Block:
    rng = np.random.default_rng(number)
    series = {"amax": rng.normal(size=(STEPS, 2)), "loss": rng.normal(size=STEPS)}
    return Block(STEPS * number, LAYERS, {name: values.astype(np.float32) for name, values in series.items()})


def written_files(folder: Path) -> None:
    record = FileRecord(folder)
    for number in range(BLOCKS):
        record.write_block(block(number))
        record.write_event("alert", STEPS * number, {"layer": "a", "value": 0.5 + number})
    record.close()


def written_tensorboard(folder: Path) -> None:
    with SummaryWriter(str(folder)) as writer:
        record = TensorBoardRecord(writer)
        for number in range(BLOCKS):
            record.write_block(block(number))
            record.write_event("alert", STEPS * number, {"layer": "a", "value": 0.5 + number})


WRITTEN = {"files": written_files, "tensorboard": written_tensorboard}


def assert_right_where_read(read: Record, whole: Record) -> bool:
    """Whether everything was read."""
    rows = np.searchsorted(whole.steps, read.steps)
    for name, values in read.series.items():
        expected = whole.series[name][rows]
        lost = np.isnan(values)
        np.testing.assert_array_equal(values[~lost], expected[~lost])
    assert all(event in whole.events for event in read.events)
    everything = len(read.events) == len(whole.events) and len(read.steps) == len(whole.steps)
    return everything and read.series.keys() == whole.series.keys() and not any(map(has_nan, read.series.values()))


def has_nan(values: np.ndarray) -> bool:
    return bool(np.isnan(values).any())


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_anywhere_changes_no_figure_and_what_is_lost_is_said(tmp_path: Path, kind: str, damage: str) -> None:
    WRITTEN[kind](tmp_path)
    whole = read_record(tmp_path)
    files = sorted(path for path in tmp_path.iterdir() if path.name != "record.json")
    dice = random.Random(0)
    losses = 0
    for _ in range(150):
        path = dice.choice(files)
        good = path.read_bytes()
        content = bytearray(good)
        place = dice.randrange(len(content))
        if damage == "one bit":
            content[place] ^= 1 << dice.randrange(8)
        else:
            content[place : place + 512] = bytes(len(content[place : place + 512]))
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            read = read_record(tmp_path)
        path.write_bytes(good)
        everything = assert_right_where_read(read, whole)
        assert everything or said, (path.name, place)
        losses += not everything
        assert len(read.steps) >= len(whole.steps) - 5 * STEPS or damage != "one bit"
    assert losses > 100  # the damage did hit something


@pytest.mark.parametrize("garbage", [b"\xff" * 12, b"\x05" + bytes(11) + b"\xff" * 9, bytes(4096), b"a note " * 100])
def test_garbage_in_an_event_file_is_skipped_and_said(tmp_path: Path, garbage: bytes) -> None:
    written_tensorboard(tmp_path)
    whole = read_record(tmp_path)
    (path,) = tmp_path.glob("*tfevents*")
    good = path.read_bytes()
    for content in (good + garbage, garbage + good):
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="is damaged in 1 piece; what they held is left out"):
            assert assert_right_where_read(read_record(tmp_path), whole)
        with SummaryWriter(str(tmp_path / "other")) as writer:
            writer.log_dir = str(tmp_path)
            with pytest.warns(UserWarning, match="damaged"):
                TensorBoardRecord(writer)  # as a resumed run does


def test_files_that_only_look_like_event_files_are_skipped_and_said(tmp_path: Path) -> None:
    written_tensorboard(tmp_path)
    (tmp_path / "events.out.tfevents.note.txt").write_text("copied from host a on Friday, see the wiki for how")
    (tmp_path / "old.tfevents.d").mkdir()
    (tmp_path / "events.out.tfevents.1.data").write_bytes(framed(b"\xff" * 40) * 3)  # records, of something else
    with pytest.warns(UserWarning, match="is damaged in") as said:
        read = read_record(tmp_path)
    assert len(read.steps) == BLOCKS * STEPS
    assert {str(warning.message).partition(" is damaged in ")[2][:8] for warning in said} == {"1 piece;", "3 pieces"}


def test_a_tag_whose_first_description_is_damaged_is_read_by_the_next_one(tmp_path: Path) -> None:
    written_tensorboard(tmp_path)
    (path,) = tmp_path.glob("*tfevents*")
    content = path.read_bytes()
    place = content.index(b'"series": "amax"')
    path.write_bytes(content[:place] + b"X" + content[place + 1 :])
    with pytest.warns(UserWarning, match="damaged in 1 piece"):
        amax = read_record(tmp_path).series["amax"]
    assert np.isnan(amax[:STEPS]).all()
    assert not np.isnan(amax[STEPS:]).any()


@pytest.mark.parametrize("content", [b"", b"\0" * 30, b'{"vers', b'"x"', b'{"version": "new"}', None])
def test_a_header_that_is_damaged_or_missing_costs_nothing(tmp_path: Path, content: bytes | None) -> None:
    written_files(tmp_path)
    whole = read_record(tmp_path)
    header = tmp_path / "record.json"
    header.unlink() if content is None else header.write_bytes(content)
    with pytest.warns(UserWarning, match=r"record\.json is .*; the rest of the record is read"):
        assert assert_right_where_read(read_record(tmp_path), whole)
    resumed = FileRecord(tmp_path)
    resumed.write_block(block(BLOCKS))
    assert len(read_record(tmp_path).steps) == (BLOCKS + 1) * STEPS  # and nothing is said any more


def test_foreign_and_empty_files_are_left_out_and_said(tmp_path: Path) -> None:
    written_files(tmp_path)
    whole = read_record(tmp_path)
    copy = (tmp_path / "block-00000003.npz").read_bytes()
    (tmp_path / "block-00000003 (copy).npz").write_bytes(copy)
    (tmp_path / "block-x.npz").write_bytes(b"")
    np.savez(tmp_path / "block-00000077.npz", weights=np.ones(3))
    (tmp_path / "block-00000078.npz").write_bytes(b"PK")
    (tmp_path / "block-00000079.npz").mkdir()
    with pytest.warns(UserWarning, match="left out") as said:
        assert assert_right_where_read(read_record(tmp_path), whole)
    assert len(said) == 5
    FileRecord(tmp_path).write_block(block(BLOCKS))
    assert (tmp_path / "block-00000080.npz").exists()


def test_broken_lines_of_events_are_left_out_and_counted(tmp_path: Path) -> None:
    written_files(tmp_path)
    events = tmp_path / "events.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    lines[1] = b"\xff\xfe" + lines[1]
    lines[2] = b"\n"
    lines[3] = lines[3].replace(b"3.5", b"4.5")
    lines[4] = b'["alert"]\n'
    lines[5] = b'{"kind": "alert", "step": 3, "data": {}, "more": 1}\n'
    lines[6] = b'{"kind": "alert", "step": 30, "data": {}}\n'  # as an older version writes it
    events.write_bytes(b"".join(lines) + b'{"kind": "al')
    with pytest.warns(UserWarning, match=r"has 5 broken lines; they are left out"):
        read = read_record(tmp_path)
    assert [event.step for event in read.events] == [0, 30, 35, 40, 45]
    events.unlink()
    assert read_record(tmp_path).events == []


def test_two_writers_in_one_folder_keep_all_their_blocks_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = FileRecord(tmp_path), FileRecord(tmp_path)
    for number in range(5):
        first.write_block(block(number))
        second.write_block(block(5 + number))
        first.write_event("alert", number, {})
        second.write_event("alert", 5 + number, {})
    assert [len(list(tmp_path.glob(pattern))) for pattern in ("block-*.npz", "*.tmp")] == [10, 0]
    read = read_record(tmp_path)
    for number in range(BLOCKS):
        np.testing.assert_array_equal(read.series["amax"][STEPS * number :][:STEPS], block(number).series["amax"])
    assert [event.step for event in read.events] == list(range(10))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert all(re.search("another run writes its record into .* too", message) for message in told)


def test_where_the_file_system_has_no_links_a_block_is_still_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    first, second = FileRecord(tmp_path), FileRecord(tmp_path)
    for number in range(5):
        first.write_block(block(number))
        second.write_block(block(5 + number))
    assert len(read_record(tmp_path).steps) == BLOCKS * STEPS
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_goes_on_where_somebody_swept_its_folder_away(tmp_path: Path) -> None:
    import shutil

    record = FileRecord(tmp_path / "run")
    record.write_block(block(0))
    shutil.rmtree(tmp_path / "run")
    record.write_block(block(1))
    record.write_event("alert", 7, {})
    read = read_record(tmp_path / "run")
    assert read.steps.tolist() == list(range(STEPS, 2 * STEPS))
    assert len(read.events) == 1


@pytest.mark.parametrize("length", [0, 1, 9, 1999, 2000, 2001, 2047, 2048, 2049, 5000, 100_003])
def test_the_checksum_is_tensorboards(length: int) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    data = random.Random(length).randbytes(length)
    assert framed(data)[-4:] == int(masked_crc32c(data)).to_bytes(4, "little")
    assert crc32c(memoryview(data)) == crc32c(data)
    assert list(events_of(framed(data))) == [data]
