"""Old steps of a record are thinned to a bound: extremes stay where they were, and nothing is read twice or lost."""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabnorm.dashboard.runs import open_run
from stabnorm.monitor import _thinning, record
from stabnorm.monitor._buckets import in_buckets, opened
from stabnorm.monitor._folders import create_file
from stabnorm.monitor.record import Block, FileRecord, Record, read_record

LAYERS = tuple("abcdefghijkl")
STEPS = 100  # of a flush
BOUND = 1 << 20
LONG = 130  # blocks, of which the oldest are thinned twice
SPIKE, SPIKE_AT = 1000.0, 137


def values(first: int, count: int, seed: int = 0) -> Any:
    return _noise(seed)[first : first + count]


@functools.cache
def _noise(seed: int) -> Any:
    noise = np.random.default_rng(seed).lognormal(0, 0.1, (20_000, len(LAYERS))).astype(np.float32)
    noise[SPIKE_AT, 1] = SPIKE
    return noise


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power fails while a test runs, and waiting for the disk is slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def block(first: int, count: int = STEPS, seed: int = 0, layers: tuple[str, ...] = LAYERS) -> Block:
    amax = values(first, count, seed)
    largest = np.stack([amax, amax / 2], -1)
    ids = np.round(amax * 1000)
    series = {
        "amax": amax,
        "loss": amax[:, 0],
        "top_channel_values": largest,
        "top_channel_ids": np.stack([ids, ids + 1], -1),
    }
    return Block(first, layers, series)


def written(folder: Path, blocks: int, bound: int | None = BOUND) -> FileRecord:
    writer = FileRecord(folder, most_bytes=bound)
    for number in range(blocks):
        writer.write_block(block(number * STEPS))
    return writer


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.npz"))


def newest_whole(folder: Path) -> int:
    """The first step that is not thinned."""
    firsts = []
    for path in folder.glob("block-*.npz"):
        with np.load(path) as file:
            firsts.append(int(file["@steps"][0]))
    return min(firsts)


@pytest.mark.parametrize("first", [0, 5, 30])
@pytest.mark.parametrize("size", [4, 16, 256])
def test_extremes_means_and_the_first_nan_of_a_bucket_stay(first: int, size: int) -> None:
    random = np.random.default_rng(first + size)
    series = random.standard_normal((300, 5)).astype(np.float32)
    series[random.random(series.shape) < 0.1] = np.nan
    series[random.random(series.shape) < 0.02] = np.inf
    series[:, 3], series[:, 4] = np.nan, np.where(random.random(300) < 0.5, np.nan, -np.inf)
    back = opened(in_buckets({"x": series}, first, size)["x"], first, len(series), size)
    assert back.shape == series.shape
    bucket = (first + np.arange(300)) // size
    for number in np.unique(bucket):
        rows, kept = series[bucket == number], back[bucket == number]
        for before, after in zip(rows.T, kept.T, strict=True):
            known = before[~np.isnan(before)]
            assert (~np.isnan(after)).any() == bool(known.size)
            if not known.size:
                continue
            for extreme in (known.min(), known.max()):
                assert after[(before == extreme).argmax()] == extreme
            assert np.nanmin(after) == known.min()
            assert np.nanmax(after) == known.max()
            if np.isfinite(known).all() and len(known) == len(before):
                assert after.mean() == pytest.approx(before.mean(), abs=1e-5)
            if np.isnan(before).any() and np.isnan(before).argmax() not in (before.argmin(), before.argmax()):
                assert np.isnan(after[np.isnan(before).argmax()])


def test_a_long_run_keeps_the_bound_and_every_step(tmp_path: Path) -> None:
    writer = FileRecord(tmp_path, most_bytes=BOUND)
    for number in range(LONG):
        writer.write_block(block(number * STEPS))
        assert size_of(tmp_path) <= BOUND
    assert len(list(tmp_path.glob("thin-*-64.npz"))) > 0
    found = read_record(tmp_path)
    assert found.steps.tolist() == list(range(LONG * STEPS))
    assert not any(np.isnan(series).any() for series in found.series.values())


def test_an_extreme_of_an_old_step_stays_at_its_step_and_new_steps_are_whole(tmp_path: Path) -> None:
    written(tmp_path, LONG)
    found, truth = read_record(tmp_path), values(0, LONG * STEPS)
    assert newest_whole(tmp_path) > SPIKE_AT
    assert found.series["amax"][SPIKE_AT, 1] == SPIKE
    assert found.series["top_channel_values"][SPIKE_AT, 1].tolist() == [SPIKE, SPIKE / 2]
    assert found.series["top_channel_ids"][SPIKE_AT, 1].tolist() == [SPIKE * 1000, SPIKE * 1000 + 1]
    np.testing.assert_array_equal(found.series["amax"].min(0), truth.min(0))
    np.testing.assert_array_equal(found.series["amax"].argmin(0), truth.argmin(0))
    np.testing.assert_allclose(found.series["amax"].mean(0, float), truth.mean(0, float), rtol=1e-6)
    whole = newest_whole(tmp_path)
    np.testing.assert_array_equal(found.series["amax"][whole:], truth[whole:])


def test_without_a_bound_everything_stays(tmp_path: Path) -> None:
    written(tmp_path, 30, bound=None)
    np.testing.assert_array_equal(read_record(tmp_path).series["amax"], values(0, 30 * STEPS))


def test_a_resumed_run_goes_on_and_its_steps_count(tmp_path: Path) -> None:
    written(tmp_path, 40)
    back_at = newest_whole(tmp_path) - STEPS  # so that some of them are thinned
    resumed = FileRecord(tmp_path, most_bytes=BOUND)
    for number in range(3):
        resumed.write_block(block(back_at + number * STEPS, seed=1))
    found = read_record(tmp_path)
    assert found.steps.tolist() == list(range(40 * STEPS))
    again = slice(back_at, back_at + 3 * STEPS)
    np.testing.assert_array_equal(found.series["amax"][again], values(back_at, 3 * STEPS, seed=1))
    for number in range(40, 80):
        resumed.write_block(block(number * STEPS))
    found = read_record(tmp_path)
    assert found.steps.tolist() == list(range(80 * STEPS))
    assert found.series["amax"][again].max() == values(back_at, 3 * STEPS, seed=1).max()


def same(one: Record, other: Record) -> None:
    assert one.steps.tolist() == other.steps.tolist()
    assert one.series.keys() == other.series.keys()
    for name in one.series:
        np.testing.assert_array_equal(one.series[name], other.series[name])


class Killed(BaseException):
    """Not an error that anybody would catch."""


@pytest.fixture
def full(tmp_path: Path) -> tuple[Path, Record]:
    """A record without a bound, which is then to be thinned."""
    written(tmp_path, 60, bound=None)
    return tmp_path, read_record(tmp_path)


def test_a_run_killed_before_the_new_file_is_there_leaves_the_old_ones(
    full: tuple[Path, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = full

    def killed(path: Path, content: bytes) -> None:
        path.with_suffix(".tmp").write_bytes(content[: len(content) // 2])
        raise Killed

    monkeypatch.setattr(_thinning, "create_file", killed)
    with pytest.raises(Killed):
        _thinning.thin(folder, BOUND)
    same(read_record(folder), before)
    FileRecord(folder)
    assert list(folder.glob("*.tmp")) == []


def test_a_run_killed_before_the_old_files_are_gone_has_each_step_once(
    full: tuple[Path, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = full
    count = len(list(folder.glob("block-*.npz")))

    def killed(path: Path, content: bytes) -> None:
        create_file(path, content)
        raise Killed

    monkeypatch.setattr(_thinning, "create_file", killed)
    with pytest.raises(Killed):
        _thinning.thin(folder, BOUND)
    assert len(list(folder.glob("block-*.npz"))) == count
    found = read_record(folder)
    assert found.steps.tolist() == before.steps.tolist()
    assert found.series["amax"].max() == SPIKE
    FileRecord(folder)  # as a resumed run does
    assert len(list(folder.glob("block-*.npz"))) < count
    same(read_record(folder), found)


def test_a_page_follows_a_run_whose_old_steps_are_thinned(tmp_path: Path) -> None:
    writer = written(tmp_path, 10)
    run = open_run("mine", tmp_path)
    run.refresh()
    for number in range(10, 80):
        writer.write_block(block(number * STEPS))
        if number % 20 == 0:
            run.refresh()
    run.refresh()
    whole = read_record(tmp_path)
    for name in ("amax", "loss", "top_channel_ids"):
        shown = run.series(name)
        assert shown is not None
        np.testing.assert_array_equal(shown, whole.series[name])
    assert any("are thinned" in note for note in run.notes)
    assert not any("missing" in note or "written again" in note for note in run.notes)


def test_companions_layers_that_change_and_gaps_are_kept(tmp_path: Path) -> None:
    writer = FileRecord(tmp_path, most_bytes=BOUND)
    for number in range(60):
        first = number * STEPS + (1000 if number >= 5 else 0)
        writer.write_block(block(first, layers=LAYERS if number < 8 else (*LAYERS[:-1], "new")))
        heads = {"entropy": values(first, STEPS)[:, :2]}
        writer.write_block(Block(first, ("head0", "head1"), heads, companion="attention"))
    found, attention = read_record(tmp_path), read_record(tmp_path, companion="attention")
    steps = [*range(5 * STEPS), *range(5 * STEPS + 1000, 60 * STEPS + 1000)]
    assert newest_whole(tmp_path) > 8 * STEPS + 1000
    assert found.layers == (*LAYERS, "new")
    assert found.steps.tolist() == attention.steps.tolist() == steps
    assert np.isnan(found.series["amax"][:800, -1]).all()
    assert np.isnan(found.series["amax"][800:, -2]).all()
    assert np.isnan(found.series["amax"]).sum() == 800 + 52 * STEPS
    assert attention.series["entropy"][SPIKE_AT, 1] == SPIKE
    assert set(attention.series) == {"entropy"}


def test_a_damaged_block_is_kept_beside_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = written(tmp_path, 3)
    content = (tmp_path / "block-00000002.npz").read_bytes()
    (tmp_path / "block-00000002.npz").write_bytes(content[:-50])
    for number in range(3, 30):
        writer.write_block(block(number * STEPS))
    assert (tmp_path / "block-00000002.damaged").read_bytes() == content[:-50]
    assert "block-00000002.npz is damaged" in caplog.text
    assert read_record(tmp_path).steps.tolist() == [*range(STEPS), *range(2 * STEPS, 30 * STEPS)]


def test_a_record_that_cannot_be_thinned_grows_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr(record, "thin", full_disk)
    written(tmp_path, 30)
    assert caplog.text.count("No space left on device") == 1
    np.testing.assert_array_equal(read_record(tmp_path).series["amax"], values(0, 30 * STEPS))
