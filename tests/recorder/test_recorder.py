"""The flight recorder in a plain loop: what it writes, when, and that it never ends a training."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabnorm
from stabnorm import StabilityMonitor, StabNormError
from stabnorm.monitor._record_files import unpack_arrays
from stabnorm.recorder import FlightRecorder, read_dump, replay
from tests.actions.nets import batches, net
from tests.actions.test_plain_loop import AlarmAt

STATISTICS = ["amax", "token_std_mean", "grad_gain", "var_fluctuation"]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(batch["x"]).square().mean()
    return loss


def run(
    folder: Path,
    data: list[Tensor],
    *,
    detector: Any = None,
    bad: int = -1,
    dies: BaseException | None = None,
    **options: Any,
) -> FlightRecorder:
    """A plain loop; one step may be known to be bad, and it may die in its last step."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(3)
    with StabilityMonitor(model, STATISTICS, flush_every=5, detector=detector) as monitor:
        recorder = FlightRecorder(monitor, folder / "dumps", **options)
        with recorder:
            for step, x in enumerate(data):
                batch = {"x": x, "note": "kept"}
                recorder.begin(batch, indices=range(16 * step, 16 * step + 16))
                loss = loss_of(model, batch)
                batch.clear()  # as a training step may do
                if dies is not None and step == len(data) - 1:
                    raise dies
                loss.backward()
                if step == bad:
                    recorder.alarm("non_finite", "it was seen before the step", "1")
                    optimizer.zero_grad()
                else:
                    optimizer.step()
                monitor.step(loss=loss)
                recorder.end(loss)
                optimizer.zero_grad()
    return recorder


def test_nothing_is_written_while_nothing_happens(tmp_path: Path) -> None:
    assert run(tmp_path, batches(12)).dumps == []
    assert list(tmp_path.iterdir()) == []


def test_a_bad_step_is_run_again_with_the_same_figures(tmp_path: Path) -> None:
    (folder,) = run(tmp_path, batches(12), bad=7, detail_steps=0).dumps
    dump = read_dump(folder)
    assert folder.name == "step00000007-non_finite"
    assert dump.header["indices"] == [list(range(112, 128))]
    assert dump.history["@steps"].tolist() == list(range(8))
    assert np.isfinite(dump.history["loss"]).all()
    again = replay(dump, net(), loss_of)
    forward = [STATISTICS.index(name) for name in ("amax", "token_std_mean", "var_fluctuation")]
    np.testing.assert_allclose(again.again[:, forward], again.recorded[:, forward], rtol=1e-6)
    assert again.loss == pytest.approx(float(dump.history["loss"][7]), rel=1e-6)
    assert "it was seen before the step" in str(again)


def test_an_alarm_keeps_the_next_step_whole_and_the_ones_after_it_in_full(tmp_path: Path) -> None:
    (folder,) = run(tmp_path, batches(20), detector=AlarmAt, detail_steps=3, steps=6).dumps
    dump = read_dump(folder)
    assert dump.header["step"] == 10  # the alarm of step 7 came with the flush of step 9
    assert "Since step 7, one layer" in dump.header["reason"]
    assert dump.header["onset"]["layer"] == "4"
    assert dump.history["@steps"].tolist() == list(range(5, 11))
    again = replay(dump, net(), loss_of)
    assert again.difference < 1e-5
    assert np.isfinite(again.recorded).all()
    with unpack_arrays((folder / "detail.npz").read_bytes()) as detail:
        assert detail["@steps"].tolist() == [11, 12, 13]
        assert len(detail.files) > 20


@pytest.mark.parametrize("dies", [RuntimeError("boom"), SystemExit(143)])
def test_an_exception_keeps_the_step_that_failed(tmp_path: Path, dies: BaseException) -> None:
    with pytest.raises(type(dies)):
        run(tmp_path, batches(8), dies=dies)
    (folder,) = (tmp_path / "dumps").iterdir()
    dump = read_dump(folder)
    assert (dump.header["step"], dump.header["complete_step"]) == (7, False)
    assert dump.header["kind"] == ("exception" if isinstance(dies, RuntimeError) else "sigterm")
    assert torch.equal(dump.step["batches"][0]["batch"]["x"], batches(8)[7])
    assert "not finished" in str(replay(dump, net(), loss_of))


def test_the_end_by_the_user_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, batches(4), dies=KeyboardInterrupt())
    assert not (tmp_path / "dumps").exists()


def terminated(recorder: FlightRecorder) -> None:
    with recorder:
        recorder.begin(torch.randn(2, 4))
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_is_answered_while_it_runs_and_left_alone_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StabilityMonitor(net(), ["amax"]) as monitor:
        recorder = FlightRecorder(monitor, tmp_path)
        with pytest.raises(SystemExit):
            terminated(recorder)
    assert [path.name for path in recorder.dumps] == ["step00000000-sigterm"]
    assert signal.getsignal(signal.SIGTERM) is before
    mine = lambda *_: None  # noqa: E731
    signal.signal(signal.SIGTERM, mine)
    try:
        with FlightRecorder(monitor, tmp_path):
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_too_large_is_left_out_and_named(tmp_path: Path) -> None:
    (folder,) = run(tmp_path, batches(8), bad=3, weight_bytes=10).dumps
    with pytest.raises(StabNormError, match=r"no weights: they have [\d,]+ bytes, and weight_bytes is 10"):
        replay(read_dump(folder), net(), loss_of)
    assert np.isfinite(replay(read_dump(folder), net(), loss_of, checkpoint={"state_dict": net().state_dict()}).loss)
    (folder,) = run(tmp_path / "other", batches(8), bad=3, batch_bytes=10).dumps
    with pytest.raises(StabNormError, match="they have 256 bytes, and batch_bytes is 10"):
        replay(read_dump(folder), net(), loss_of)


def test_a_folder_that_cannot_be_written_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "dumps").write_text("a file where the folder should be")
    assert run(tmp_path, batches(8), bad=3).dumps == []
    assert caplog.text.count("no dump is written, and the training goes on") == 1


def test_a_full_disk_ends_no_training_and_leaves_no_half_dump(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    recorder = run(tmp_path, batches(8), bad=3)
    assert recorder.dumps == []
    assert list((tmp_path / "dumps").iterdir()) == []
    assert "No space left on device" in caplog.text


def test_a_damaged_dump_is_said_to_be_damaged(tmp_path: Path) -> None:
    (folder,) = run(tmp_path, batches(8), bad=3).dumps
    weights = folder / "weights.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StabNormError, match=r"weights\.pt is damaged"):
        read_dump(folder)
    weights.unlink()
    with pytest.raises(StabNormError, match=r"weights\.pt is missing"):
        read_dump(folder)
    header = json.loads((folder / "dump.json").read_text())
    (folder / "dump.json").write_text(json.dumps({**header, "version": 99}))
    with pytest.raises(StabNormError, match="newer version"):
        read_dump(folder)
    with pytest.raises(FileNotFoundError, match="is no dump"):
        read_dump(tmp_path)


def test_micro_batches_and_masks_are_run_again_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5))
    with StabilityMonitor(model, ["amax", "token_std_mean"]) as monitor:
        recorder = FlightRecorder(monitor, tmp_path, detail_steps=0)
        for _ in range(2):
            x, mask = torch.randn(3, 5, 4), torch.rand(3, 5) > 0.3
            recorder.begin(x, masks=[mask])
            with stabnorm.valid_tokens(mask):
                model(x).sum().backward()
        recorder.alarm("non_finite", "both micro-batches")
        monitor.step()
        recorder.end()
    again = replay(read_dump(recorder.dumps[0]), model, lambda model, batch: model(batch).sum())
    assert again.difference < 1e-6
    assert len(again.dump.step["batches"]) == 2


def test_there_are_no_more_dumps_than_asked_for(tmp_path: Path) -> None:
    model = net()
    with StabilityMonitor(model, ["amax"]) as monitor:
        recorder = FlightRecorder(monitor, tmp_path, times=2, detail_steps=0)
        for step in range(400):
            recorder.begin(step)
            recorder.alarm("non_finite", "always")
            monitor.steps_done += 1
            recorder.end()
    assert len(recorder.dumps) == 2
