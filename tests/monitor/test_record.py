import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR
from torch.utils.tensorboard import SummaryWriter

from stabnorm.monitor import _record_format, record
from stabnorm.monitor.record import Block, FileRecord, RecordWriter, TensorBoardRecord, read_record

LAYERS = ("encoder.0.norm1", "encoder.0.norm2", "encoder.1.norm1")


class Recorder:
    """Opens a record in a directory, again after a close, as a resumed run does."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.directory = kind, directory
        self._writers: list[Any] = []

    def open(self) -> RecordWriter:
        if self.kind == "files":
            return FileRecord(self.directory)
        writer = SummaryWriter(str(self.directory))
        self._writers.append(writer)
        return TensorBoardRecord(writer)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


@pytest.fixture(params=["files", "tensorboard"])
def recorder(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    recorder = Recorder(request.param, tmp_path / "run")
    yield recorder
    recorder.close()


def block(first_step: int, num_steps: int = 5, layers: tuple[str, ...] = LAYERS, k: int = 2, seed: int = 0) -> Block:
    rng = np.random.default_rng(seed)
    return Block(
        first_step,
        layers,
        {
            "amax": rng.normal(size=(num_steps, len(layers))).astype(np.float32),
            "loss": rng.normal(size=num_steps).astype(np.float32),
            "top_channel_ids": rng.integers(0, 4096, size=(num_steps, len(layers), k)).astype(np.float32),
        },
    )


def test_what_was_written_is_read_bit_for_bit(recorder: Recorder) -> None:
    written = [block(1, seed=0), block(6, num_steps=3, seed=1)]
    with_nan = written[1].series["amax"]
    with_nan[0] = np.nan, np.inf, -np.inf
    writer = recorder.open()
    for part in written:
        writer.write_block(part)
    writer.close()

    read = read_record(recorder.directory)

    assert read.layers == LAYERS
    assert read.steps.tolist() == list(range(1, 9))
    assert set(read.series) == {"amax", "loss", "top_channel_ids"}
    for name, values in read.series.items():
        expected = np.concatenate([part.series[name] for part in written])
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


def test_of_a_step_written_twice_the_last_counts(recorder: Recorder) -> None:
    first, second = block(0, 10, seed=0), block(6, 8, seed=1)
    for part in first, second:
        writer = recorder.open()
        writer.write_block(part)
        writer.close()

    read = read_record(recorder.directory)

    assert read.steps.tolist() == list(range(14))
    np.testing.assert_array_equal(
        read.series["amax"], np.concatenate([first.series["amax"][:6], second.series["amax"]])
    )


def test_a_resumed_run_with_fewer_layers_leaves_nothing_of_the_first_in_its_steps(recorder: Recorder) -> None:
    first, second = block(0, 10, seed=0), block(6, 8, LAYERS[:1], k=1, seed=1)
    for part in first, second:
        writer = recorder.open()
        writer.write_block(part)
        writer.close()

    read = read_record(recorder.directory)

    amax, ids = read.series["amax"], read.series["top_channel_ids"]
    np.testing.assert_array_equal(amax[:6], first.series["amax"][:6])
    np.testing.assert_array_equal(amax[6:, :1], second.series["amax"])
    np.testing.assert_array_equal(ids[6:, :1, :1], second.series["top_channel_ids"])
    assert np.isnan(amax[6:, 1:]).all()
    assert np.isnan(ids[6:, 0, 1]).all()


def test_steps_that_nobody_wrote_are_left_out(recorder: Recorder) -> None:
    writer = recorder.open()
    writer.write_block(block(0, 2))
    writer.write_block(block(10, 2))
    writer.write_block(Block(12, LAYERS, {}))
    writer.close()
    assert read_record(recorder.directory).steps.tolist() == [0, 1, 10, 11]


@pytest.mark.parametrize("reopen", [False, True], ids=["same writer", "resumed"])
def test_layers_and_k_may_change(recorder: Recorder, reopen: bool) -> None:
    changed = ("head.norm", LAYERS[1])
    parts = [block(0, 3), block(3, 3, changed, k=3, seed=1), block(6, 2, seed=2)]
    writer = recorder.open()
    for part in parts:
        writer.write_block(part)
        if reopen:
            writer.close()
            writer = recorder.open()
    writer.close()

    read = read_record(recorder.directory)

    assert read.layers == (*LAYERS, "head.norm")
    amax = read.series["amax"]
    np.testing.assert_array_equal(amax[:3, :3], parts[0].series["amax"])
    np.testing.assert_array_equal(amax[3:6, [3, 1]], parts[1].series["amax"])
    np.testing.assert_array_equal(amax[6:, :3], parts[2].series["amax"])
    assert np.isnan(amax[3:6, [0, 2]]).all()
    assert np.isnan(amax[:3, 3]).all()
    ids = read.series["top_channel_ids"]
    assert ids.shape == (8, 4, 3)
    assert np.isnan(ids[:3, :3, 2]).all()
    np.testing.assert_array_equal(ids[3:6, [3, 1]], parts[1].series["top_channel_ids"])


def test_events_survive_with_their_non_finite_numbers(recorder: Recorder) -> None:
    alert = {
        "layer": "encoder.0",
        "value": float("inf"),
        "seen": np.float32("nan"),
        "ids": np.arange(3),
        "pair": (1, -1),
    }
    writer = recorder.open()
    writer.write_event("hold", 9, {"reason": "gap"})
    writer.write_event("alert", 7, alert)
    writer.close()

    alert_read, hold_read = read_record(recorder.directory).events

    assert (alert_read.kind, alert_read.step) == ("alert", 7)
    expected = {"layer": "encoder.0", "value": "Infinity", "seen": "NaN", "ids": [0, 1, 2], "pair": [1, -1]}
    assert alert_read.data == expected
    assert float(alert_read.data["value"]) == np.inf
    assert (hold_read.kind, hold_read.step, hold_read.data) == ("hold", 9, {"reason": "gap"})


def test_a_resumed_run_does_not_repeat_an_event(recorder: Recorder) -> None:
    for _ in range(2):
        writer = recorder.open()
        writer.write_event("alert", 3, {"layer": "a"})
        writer.close()
    assert len(read_record(recorder.directory).events) == 1


def test_a_record_without_blocks_or_events_is_empty(tmp_path: Path) -> None:
    FileRecord(tmp_path).close()
    read = read_record(tmp_path)
    assert (read.layers, read.steps.size, dict(read.series), read.events) == ((), 0, {}, [])


def test_one_series_is_read_without_the_rest(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = recorder.open()
    writer.write_block(block(0))
    writer.close()
    loaded: list[str] = []
    spy(monkeypatch, np.lib.npyio.NpzFile, "__getitem__", lambda _, name: loaded.append(name))
    spy(monkeypatch, sys.modules["tensorboard.util.tensor_util"], "make_ndarray", lambda _: loaded.append("tensor"))

    read = read_record(recorder.directory, series=["loss", "no such series"])

    assert set(read.series) == {"loss"}
    assert read.steps.tolist() == list(range(5))
    assert read.layers == LAYERS
    assert [name for name in loaded if name[0] != "@"] == ["loss" if recorder.kind == "files" else "tensor"]


def spy(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, tell: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def spied(*args: Any) -> Any:
        tell(*args)
        return original(*args)

    monkeypatch.setattr(owner, name, spied)


def test_a_tag_describes_itself_where_tensorboard_looks(tmp_path: Path) -> None:
    recorder = Recorder("tensorboard", tmp_path)
    writer = recorder.open()
    for first_step in range(0, 100, 5):
        writer.write_block(block(first_step))
    writer.write_block(block(100, layers=LAYERS[:1]))
    writer.write_event("alert", 3, {})
    recorder.close()

    accumulator = EventAccumulator(str(tmp_path), {TENSORS: 0})
    accumulator.Reload()

    metadata = accumulator.SummaryMetadata("stabnorm/amax")
    assert metadata.plugin_data.plugin_name == "stabnorm"
    assert metadata.data_class == DATA_CLASS_TENSOR
    assert json.loads(metadata.plugin_data.content) == {
        "version": 1,
        "series": "amax",
        "layers": list(LAYERS),
        "axes": ["step", "layer"],
    }
    changed = json.loads(accumulator.SummaryMetadata("stabnorm/amax@2").plugin_data.content)
    assert (changed["series"], changed["layers"]) == ("amax", [LAYERS[0]])
    event = json.loads(accumulator.SummaryMetadata("stabnorm/event/alert").plugin_data.content)
    assert event == {"version": 1, "event": "alert"}
    assert [event.step for event in accumulator.Tensors("stabnorm/amax")] == list(range(4, 100, 5))


def test_other_tags_of_the_run_are_not_ours(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 0)
        writer.add_text("note", "hello", 0)
        TensorBoardRecord(writer).write_block(block(0))
    assert set(read_record(tmp_path).series) == {"amax", "loss", "top_channel_ids"}


def test_a_killed_run_leaves_a_readable_record(tmp_path: Path) -> None:
    writer = FileRecord(tmp_path)
    writer.write_block(block(0, seed=0))
    writer.write_event("alert", 1, {"layer": "a"})
    writer.close()
    (tmp_path / "block-00000002.tmp").write_bytes((tmp_path / "block-00000001.npz").read_bytes()[:100])
    with (tmp_path / "events.jsonl").open("a") as events:
        events.write('{"kind": "alert", "ste')

    read = read_record(tmp_path)
    assert read.steps.tolist() == list(range(5))
    assert [event.step for event in read.events] == [1]

    resumed = FileRecord(tmp_path)
    resumed.write_block(block(5, seed=1))
    resumed.write_event("alert", 6, {"layer": "b"})
    resumed.close()
    assert sorted(path.name for path in tmp_path.glob("block-*")) == ["block-00000001.npz", "block-00000002.npz"]
    read = read_record(tmp_path)
    assert read.steps.tolist() == list(range(10))
    assert [event.step for event in read.events] == [1, 6]


def test_a_block_damaged_by_a_crash_costs_only_its_steps(tmp_path: Path) -> None:
    writer = FileRecord(tmp_path)
    for first_step in 0, 5, 10:
        writer.write_block(block(first_step))
    writer.close()
    (tmp_path / "block-00000001.npz").write_bytes(b"")
    second = tmp_path / "block-00000002.npz"
    second.write_bytes(second.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="damaged; its steps are left out") as caught:
        read = read_record(tmp_path)
    assert len(caught) == 2
    assert read.steps.tolist() == list(range(10, 15))


def test_an_event_file_cut_short_is_read_up_to_there(tmp_path: Path) -> None:
    recorder = Recorder("tensorboard", tmp_path)
    writer = recorder.open()
    writer.write_block(Block(0, LAYERS, {"amax": np.ones((5, 3), np.float32)}))
    writer.close()
    path = next(tmp_path.glob("*tfevents*"))
    whole = path.stat().st_size
    writer.write_block(Block(5, LAYERS, {"amax": np.ones((5, 3), np.float32)}))
    recorder.close()
    content = path.read_bytes()
    for cut in whole + 5, whole + 20, len(content) - 1:
        path.write_bytes(content[:cut])
        assert read_record(tmp_path).steps.tolist() == list(range(5))


def test_a_newer_record_is_refused(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_record_format, "VERSION", 7)
    monkeypatch.setattr(record, "VERSION", 7)
    writer = recorder.open()
    writer.write_block(block(0))
    writer.close()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"version 7, and this stabnorm knows versions up to 1: upgrade"):
        read_record(recorder.directory)
    with pytest.raises(ValueError, match="version 7"):
        recorder.open()


@pytest.mark.parametrize("other", [False, True], ids=["empty", "only other tags"])
def test_where_there_is_no_record_it_says_what_it_looked_for(tmp_path: Path, other: bool) -> None:
    if other:
        with SummaryWriter(str(tmp_path)) as writer:
            writer.add_scalar("loss", 1.0, 0)
    with pytest.raises(FileNotFoundError, match=r"neither record.json nor event files .* with tags stabnorm/"):
        read_record(tmp_path)


@pytest.mark.parametrize("shape", [(), (4,), (5, 2), (5, 3, 2, 1)])
def test_a_block_refuses_a_misshapen_series(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="'odd' has shape"):
        Block(0, LAYERS, {"loss": np.zeros(5, np.float32), "odd": np.zeros(shape, np.float32)})


def test_neither_recording_nor_drawing_loads_torch(tmp_path: Path) -> None:
    modules = ["monitor.record", "dashboard.heatmap", "dashboard.headline", "dashboard.table", "dashboard.images"]
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module("stabnorm." + name)
assert not {{"torch", "lightning", "pytorch_lightning", "triton", "tensorboard"}} & set(sys.modules)
import numpy
from stabnorm.monitor.record import Block, FileRecord, read_record
writer = FileRecord({str(tmp_path)!r})
writer.write_block(Block(0, ("a",), {{"amax": numpy.ones((2, 1))}}))
writer.close()
assert read_record({str(tmp_path)!r}).layers == ("a",)
assert not {{"torch", "lightning", "pytorch_lightning", "triton"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
