"""Hosts: what is imported for each, and the variable that adds the callback without a line of code."""

import logging
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm.callbacks import StabilityCallback, auto
from stabnorm.callbacks._step_aside import AutoStabilityCallback
from stabnorm.callbacks.fabric import FabricMonitor
from stabnorm.callbacks.hugging_face import StabilityTrainerCallback
from stabnorm.monitor import read_record

ROOT = Path(__file__).parents[2]
GROUPS = ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory")


# --- the variable ---


@pytest.mark.parametrize("value", [None, "", "0", "false", "OFF", " no "])
def test_without_the_variable_there_is_no_callback(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(auto.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(auto.VARIABLE, value)
    assert auto.callbacks_of_environment() == []


def test_without_the_variable_nothing_is_loaded() -> None:
    code = (
        "import sys; before = set(sys.modules); from stabnorm.callbacks.auto import callbacks_of_environment as made; "
        "assert made() == []; print(*sorted(name.split('.')[0] for name in set(sys.modules) - before))"
    )
    environment = {name: value for name, value in os.environ.items() if name != auto.VARIABLE}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert set(ran.stdout.split()).isdisjoint({"torch", "numpy", "lightning", "pytorch_lightning", "tensorboard"})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1", "AutoStabilityCallback()"),
        ("True", "AutoStabilityCallback()"),
        ("preset=full,flush_every=20", "AutoStabilityCallback(preset='full', flush_every=20)"),
        ("gradients=False, mask=attention_mask", "AutoStabilityCallback(gradients=False, mask='attention_mask')"),
        ("mask=1, include=norm[12]$", "AutoStabilityCallback(include='norm[12]$', mask=1)"),
        ("preset=[amax, crest], exclude='a{1,2}'", "AutoStabilityCallback(preset=['amax', 'crest'], exclude='a{1,2}')"),
    ],
)
def test_the_variable_holds_the_options(value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auto.VARIABLE, value)
    (callback,) = auto.callbacks_of_environment()
    assert repr(callback) == said


def test_companions_are_named_in_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auto.VARIABLE, "companions=[attention, weights], fused=True")
    (callback,) = auto.callbacks_of_environment()
    assert [companion.name for companion in callback.companions] == ["attention", "weights"]


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        ("full", ValueError, "STABNORM_AUTO='full' is neither 1 nor options. Write them as"),
        ("flush_evry=3", TypeError, "STABNORM_AUTO has no option 'flush_evry'.*; did you mean 'flush_every'"),
        ("flush_every=0", ValueError, "flush_every=0 is out of range"),
        ("preset=ful", ValueError, "unknown preset 'ful'.*did you mean 'full'"),
    ],
)
def test_a_wrong_option_is_said_when_the_trainer_is_built(
    value: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(auto.VARIABLE, value)
    with pytest.raises(error, match=said):
        auto.callbacks_of_environment()


class ATrainer(types.SimpleNamespace):
    """What the callback reads of a Trainer before it steps aside."""

    global_step = 0
    is_global_zero = False


def test_it_steps_aside_for_a_callback_of_the_users_own_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    added, own = AutoStabilityCallback(), StabilityCallback()
    trainer: Any = ATrainer(callbacks=[own, added])
    with caplog.at_level(logging.WARNING, "stabnorm"):
        added.on_fit_start(trainer, nn.LayerNorm(4))  # type: ignore[arg-type]
    assert trainer.callbacks == [own]
    assert "adds nothing to this training: the Trainer has a StabilityCallback already" in caplog.text


def test_it_never_stops_a_training_in_which_there_is_nothing_to_watch(caplog: pytest.LogCaptureFixture) -> None:
    added = AutoStabilityCallback()
    trainer: Any = ATrainer(callbacks=[added])
    with caplog.at_level(logging.WARNING, "stabnorm"):
        added.on_fit_start(trainer, nn.Linear(4, 4))  # type: ignore[arg-type]
    assert trainer.callbacks == []
    assert "no normalization layer found in Linear" in caplog.text


def test_lightning_is_told_of_the_factory_under_both_of_its_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for group in GROUPS:
        assert project["entry-points"][group] == {"stabnorm": "stabnorm.callbacks.auto:callbacks_of_environment"}


SCRIPT = """
import sys, warnings
import torch
from torch import nn
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")
if sys.argv[1] == "lightning.pytorch":
    from lightning.pytorch import LightningModule, Trainer
else:
    from pytorch_lightning import LightningModule, Trainer

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False)
trainer = Trainer(max_steps=5, accelerator="cpu", **quiet)
trainer.fit(Net(), DataLoader(torch.randn(40, 4), batch_size=8))
names = [type(callback).__name__ for callback in trainer.callbacks]
print("steps", trainer.global_step, "callbacks", *(name for name in names if "Stability" in name))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "value"), [("pytorch_lightning", "1"), ("lightning.pytorch", "preset=full, flush_every=2")]
)
def test_a_script_without_a_line_of_ours_is_watched(host: str, value: str, tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = tmp_path / "site" / "stabnorm-0.1.0.dist-info"  # as `pip install` leaves it
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: stabnorm\nVersion: 0.1.0\n", encoding="utf-8")
    lines = [f"[{group}]\nstabnorm = {project['entry-points'][group]['stabnorm']}\n" for group in GROUPS]
    (installed / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    paths = [str(installed.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), auto.VARIABLE: value}
    command = [sys.executable, "train.py", host]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "steps 5 callbacks AutoStabilityCallback\n" in ran.stdout, ran.stderr
    assert "monitoring cost" in ran.stderr


# --- Hugging Face ---


class Padded(nn.Module):
    """A model that is called as those of Hugging Face are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, fail: bool = False) -> Tensor:
        if fail:
            raise RuntimeError("of the user's own")
        y: Tensor = self.norm(x)
        return y


def trained(callback: StabilityTrainerCallback, model: Padded, folder: Path, **known: Any) -> None:
    """One step of the Trainer's, on a batch with padding."""
    args = types.SimpleNamespace(output_dir=str(folder), **known)
    state = types.SimpleNamespace(global_step=0, is_world_process_zero=True)
    scheduler = types.SimpleNamespace(get_last_lr=lambda: [0.1])
    callback.on_train_begin(args, state, None, model=model)
    callback.on_step_begin(args, state, None, lr_scheduler=scheduler)
    with pytest.raises(RuntimeError, match="of the user's own"):
        model(torch.randn(2, 3, 4), attention_mask=torch.ones(2, 3, dtype=torch.int64), fail=True)
    model(torch.randn(2, 3, 4), attention_mask=torch.tensor([[1, 1, 0], [1, 0, 0]]))
    model.eval()
    model(torch.randn(5, 3, 4), attention_mask=torch.ones(5, 3))
    model.train()
    callback.on_step_end(args, state, None)
    callback.on_train_end(args, state, None)


@pytest.mark.parametrize(
    ("mask", "compiled", "tokens"), [("attention_mask", False, 3), (None, False, 6), ("attention_mask", True, 6)]
)
def test_padding_of_hugging_faces_models_does_not_count(
    mask: str | None, compiled: bool, tokens: int, tmp_path: Path
) -> None:
    callback, model = StabilityTrainerCallback(mask=mask), Padded()
    trained(callback, model, tmp_path, torch_compile=compiled)
    assert callback.monitor is not None
    assert callback.monitor.history()["tokens"].tolist() == [[tokens]]
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert read_record(tmp_path / "stabnorm_logs").steps.tolist() == [0]


def test_options_of_hugging_faces_callback_are_checked_when_it_is_built() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'ful'.*did you mean 'full'"):
        StabilityTrainerCallback("ful")
    with pytest.raises(TypeError, match=r"mask=5 is of type int. Give the name of the model's argument, or None"):
        StabilityTrainerCallback(mask=5)  # type: ignore[arg-type]


# --- Fabric ---


class AFabric:
    """What the monitor reads of a Fabric."""

    def __init__(self, folder: Path | None, scale: float | None = None) -> None:
        self.is_global_zero = True
        self.loggers = [] if folder is None else [types.SimpleNamespace(log_dir=str(folder))]
        scaler = None if scale is None else types.SimpleNamespace(_scale=torch.tensor(scale))
        self._precision = types.SimpleNamespace(scaler=scaler)


def test_fabrics_monitor_writes_beside_the_logger_and_knows_the_loss_scale(tmp_path: Path) -> None:
    gains = []
    for scale in (None, 1024.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        with FabricMonitor(AFabric(tmp_path / str(scale), scale), model) as monitor:
            (model(torch.randn(5, 4)).square().mean() * (scale or 1)).backward()
            monitor.step()
        gains.append(monitor.history()["grad_gain"])
        assert read_record(tmp_path / str(scale) / "stabnorm_logs").steps.tolist() == [0]
    torch.testing.assert_close(*gains)


def test_fabrics_monitor_without_a_logger_keeps_its_history_alone() -> None:
    assert FabricMonitor(AFabric(None), nn.LayerNorm(4)).records == []
    with pytest.raises(TypeError, match="fabric=None is of type NoneType"):
        FabricMonitor(None, nn.LayerNorm(4))
