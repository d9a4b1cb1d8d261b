"""The flight recorder of a Trainer, and `stabnorm replay` in a process of its own."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from stabnorm import StabNormError
from stabnorm.callbacks import StabilityCallback
from stabnorm.recorder import read_dump, replay
from stabnorm.statistic import Statistic
from tests.actions.test_plain_loop import AlarmAt
from tests.lightning_small import BATCHES, SIZE, Sentences, fit, loader, module, trainer

STATISTICS: list[str | Statistic] = ["amax", "token_std_mean", "grad_gain"]
ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
import warnings
import torch, pytorch_lightning as pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from stabnorm.callbacks import StabilityCallback

class Net(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Dropout(0.2), nn.Linear(width, 1))
    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    x[18] = torch.nan
    callback = StabilityCallback(["amax", "token_std_mean", "grad_gain"], actions={"non_finite": "skip"})
    run = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback],
                     enable_progress_bar=False, default_root_dir=sys.argv[1])
    run.fit(Net(width=16), DataLoader(TensorDataset(x), batch_size=4))
    print("DUMP", callback.recorder.dumps[0])
"""


def loss_of(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model.loss(batch)
    return loss


def python(*arguments: object, folder: Path) -> str:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_a_dump_is_run_again_in_another_process_without_being_told_how(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    dump = python(script, tmp_path / "run", folder=tmp_path).split("DUMP ")[1].strip()
    assert dump.endswith("step00000004-non_finite")
    assert read_dump(dump).header["indices"] == [[16, 17, 18, 19]]
    printed = python("-m", "stabnorm", "replay", dump, folder=tmp_path)
    assert "the norm 'net.1' is not finite" in printed
    named = [line for line in printed.splitlines() if line.startswith("net.1") and "token_std_mean" in line]
    assert len(named) == 1
    recorded, again = named[0].split()[-2:]
    assert recorded == again
    assert "loss: nan" in printed


def test_an_exception_in_a_fit_is_dumped_with_its_batch(tmp_path: Path) -> None:
    callback = StabilityCallback(STATISTICS)
    with pytest.raises(RuntimeError, match="boom"):
        fit(trainer(tmp_path, callback), module(poison=5))
    assert callback.directory is not None
    (folder,) = (callback.directory / "dumps").iterdir()
    dump = read_dump(folder)
    assert folder.name == "step00000005-exception"
    assert dump.header["reason"] == "RuntimeError: boom"
    assert dump.header["indices"] == [list(range(5 * SIZE, 6 * SIZE))]
    assert dump.history["@steps"].tolist() == [0, 1, 2, 3, 4]


def test_sigterm_in_a_fit_is_dumped(tmp_path: Path) -> None:
    class Killed(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise SIGTERMException

    callback = StabilityCallback(STATISTICS)
    with pytest.raises(SIGTERMException):
        fit(trainer(tmp_path, callback, Killed()), module())
    assert callback.recorder is not None
    assert [path.name for path in callback.recorder.dumps] == ["step00000003-sigterm"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_after_an_alarm_is_run_again_to_the_same_figures(tmp_path: Path, accumulate: int) -> None:
    class Soon(AlarmAt):
        step = 2

    callback = StabilityCallback(STATISTICS, flush_every=3, detector=Soon, mask="mask")
    fit(trainer(tmp_path, callback, accumulate_grad_batches=accumulate), module())
    assert callback.recorder is not None
    (folder,) = callback.recorder.dumps
    dump = read_dump(folder)
    assert dump.header["step"] == 3
    assert dump.header["indices"] == [
        list(range((3 * accumulate + i) * SIZE, (3 * accumulate + i + 1) * SIZE)) for i in range(accumulate)
    ]
    with pytest.raises(StabNormError, match=r"asks its Trainer.*--loss"):
        replay(dump, module())
    again = replay(dump, module(), loss_of)
    assert again.difference < 1e-5
    assert (folder / "detail.npz").exists()


def test_recording_changes_nothing_and_leaves_the_sampler_alone(tmp_path: Path) -> None:
    own = torch.utils.data.BatchSampler.__iter__
    states = []
    for dumps in (0, 3):
        callback = StabilityCallback(STATISTICS, flush_every=3, detector=AlarmAt, dumps=dumps)
        model = module()
        torch.manual_seed(7)
        fit(trainer(tmp_path, callback), model)
        states.append((model.losses, torch.get_rng_state()))
        assert (callback.recorder is None) == (dumps == 0)
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-6)
    assert torch.equal(states[0][1], states[1][1])
    assert torch.utils.data.BatchSampler.__iter__ is own
    assert len(loader()) == BATCHES


def test_a_fast_dev_run_has_no_recorder(tmp_path: Path) -> None:
    callback = StabilityCallback(STATISTICS)
    fit(trainer(tmp_path, callback, fast_dev_run=2), module())
    assert callback.recorder is None
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_dumps_is_checked() -> None:
    with pytest.raises(ValueError, match="dumps=-1 is out of range"):
        StabilityCallback(dumps=-1)


class OneBad(Sentences):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        if index == 5 * SIZE + 2:
            item["x"][1] = torch.inf
        return item


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = OneBad()
        return (rows[index] for index in range(len(rows)))


def test_the_rows_that_did_it_are_in_log_record_report_and_dump(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = StabilityCallback(STATISTICS, flush_every=3, mask="mask", actions={"non_finite": "skip"})
    model = module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, callback).fit(model, DataLoader(OneBad(), batch_size=SIZE))
    assert len(model.losses) == BATCHES  # the run again is no step of the user's module
    sample = 5 * SIZE + 2
    said = f"Row 2 of {SIZE} (sample {sample} of the data set) did it: at the input of net.1 a value is not finite"
    assert f"stabnorm, step 5: {said} at token 1" in caplog.text
    assert callback.directory is not None
    assert said in (callback.directory / "report.md").read_text()
    (folder,) = (callback.directory / "dumps").iterdir()
    assert read_dump(folder).header["rows"]["rows"][0]["sample"] == sample
    again = replay(read_dump(folder), module(), loss_of).rows
    assert again is not None
    assert again.sentence.startswith(said)


def test_the_row_of_a_stream_is_found_where_training_step_leaves_out_the_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = StabilityCallback(STATISTICS, mask="mask", actions={"non_finite": "skip"})
    model = module()
    usual = model.training_step

    def no_loss_of_a_bad_batch(batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        loss: Tensor = usual(batch, batch_idx)
        return loss if loss.isfinite() else None

    model.training_step = no_loss_of_a_bad_batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, callback, max_epochs=1).fit(model, DataLoader(Stream(), batch_size=SIZE))
    assert f"stabnorm, step 5: Row 2 of {SIZE} did it: at the input of net.1 a value is not finite" in caplog.text
    assert "cannot be compared" not in caplog.text
