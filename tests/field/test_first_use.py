"""What somebody meets who uses stabnorm for the first time: batches of any class, and messages that are true."""

import logging
import re
import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor, StabNormError, convert_norms
from stabnorm._models.masks import masks_of
from stabnorm.callbacks import StabilityCallback
from stabnorm.callbacks._recorder import recipe_of
from stabnorm.monitor.detect import RobustDetector
from stabnorm.monitor.statistics import resolve
from stabnorm.recorder import FlightRecorder, read_dump
from stabnorm.recorder.again import build
from stabnorm.recorder.dump import Dump
from tests.lightning_small import fit, module, trainer

VALID = torch.tensor([[True, False]])


@dataclass
class Batch:
    x: Any
    valid: Any


Pair = namedtuple("Pair", ["x", "valid"])


@pytest.mark.parametrize(
    "batch", [Batch(None, VALID), Pair(None, VALID), SimpleNamespace(x=None, valid=VALID), {"x": None, "valid": VALID}]
)
def test_a_mask_is_found_by_its_name_in_a_batch_of_any_class(batch: Any) -> None:
    (mask,) = masks_of(batch, "valid")
    assert mask is VALID
    with pytest.raises(
        ValueError, match=r"mask='valud' is no entry .* has \['x', 'valid'\]; did you mean 'valid'\? Na"
    ):
        masks_of(batch, "valud")


@pytest.mark.parametrize("batch", [torch.zeros(2, 3), (torch.zeros(2, 3), VALID)])
def test_an_attribute_of_a_tensor_or_a_tuple_is_no_mask(batch: Any) -> None:
    with pytest.raises(ValueError, match=rf"is no entry of the batch, which is a {type(batch).__name__}\. Name"):
        masks_of(batch, "valid")


def test_a_run_that_fails_before_its_first_batch_leaves_no_dump(tmp_path: Path) -> None:
    class Failing(StabilityCallback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            raise RuntimeError("the data cannot be read")

    callback = Failing()
    with pytest.raises(RuntimeError, match="cannot be read"):
        fit(trainer(tmp_path, callback), module())
    assert callback.recorder is not None
    assert callback.recorder.dumps == []
    assert list(tmp_path.rglob("dump.json")) == []


@pytest.mark.parametrize(
    ("open_step", "options", "said"),
    [
        (True, {}, r"`stabnorm replay \S+` runs it again"),
        (False, {}, "it has the last steps, but none to run again: no step was open"),
        (True, {"batch_bytes": 1}, "none to run again: they have 32 bytes, and batch_bytes is 1"),
        (True, {"weight_bytes": 1}, r"--checkpoint FILE` runs it again; its weights are left out: they have 224 bytes"),
    ],
)
def test_a_dump_says_whether_its_step_can_be_run_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, open_step: bool, options: dict[str, Any], said: str
) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), torch.ones(2, 4)
    caplog.set_level(logging.INFO)
    with StabilityMonitor(model) as monitor:
        recorder = FlightRecorder(monitor, tmp_path, **options)
        recorder.begin(batch)
        model(batch).sum().backward()
        monitor.step()
        recorder.end()
        if open_step:
            recorder.begin(batch)
        recorder.crashed(RuntimeError("boom"))
    (folder,) = recorder.dumps
    assert read_dump(folder).header["step"] == int(open_step)
    assert any(re.search(said, record.getMessage()) for record in caplog.records)


class Unsaved(nn.Module):
    hparams: ClassVar[dict[str, Any]] = {}

    def __init__(self, width: int) -> None:
        super().__init__()


def test_a_dump_says_why_its_model_cannot_be_built_before_a_script_is_run_for_it() -> None:
    class Local(nn.Module): ...

    assert recipe_of(Local()) == {"unknown": "the class Local is defined inside a function"}  # type: ignore[arg-type]
    assert "the arguments of Unsaved: missing a required argument: 'width'" in recipe_of(Unsaved(3))["unknown"]  # type: ignore[arg-type]
    Unsaved.hparams = {"width": nn.ReLU()}
    assert recipe_of(Unsaved(3)) == {"unknown": "its hyperparameters are no plain numbers and texts"}  # type: ignore[arg-type]
    Unsaved.hparams = {"width": 3}
    made = recipe_of(Unsaved(3))  # type: ignore[arg-type]
    assert made == {"module": __name__, "class": "Unsaved", "hyperparameters": {"width": 3}}
    dump = Dump(Path(), {"model": {"unknown": "the class Local is defined inside a function"}}, {}, {}, {})
    with pytest.raises(StabNormError, match=r"how the model is built: the class Local is .*\. Name a function"):
        build(dump)


def shares_alarm(values: list[float], chunk: int = 40) -> list[int]:
    """Return the steps of the alerts that these shares below eps raise in one layer."""
    detector = RobustDetector(resolve(["eps_share"]), ["norm"])
    series = torch.tensor(values)[:, None, None]
    parts = [(start, series[start : start + chunk]) for start in range(0, len(series), chunk)]
    seen, finite = torch.full((len(series), 1), 64), torch.zeros(len(series), 1, dtype=torch.bool)
    found = [detector.update(start, part, seen[: len(part)], finite[: len(part)]) for start, part in parts]
    return [alert.step for alerts in found for alert in alerts]


def test_a_model_that_is_built_with_variances_below_eps_is_not_said_to_be_unstable() -> None:
    """MobileNetV3 has an eps of 0.001 and depthwise weights that make its first variances smaller."""
    assert shares_alarm([0.9] * 400) == []
    assert shares_alarm([0.45] * 5 + [0.6] * 300) == []  # it began near the bound
    assert shares_alarm([0.9] * 50 + [0.1] * 60 + [0.9] * 50) == []


def test_variances_that_fall_below_eps_raise_one_alert() -> None:
    assert shares_alarm([0.0] * 120 + [0.9] * 100) == [120]
    assert shares_alarm([0.9] * 50 + [0.1] * 110 + [0.9] * 50) == [160]


@pytest.mark.parametrize("to", ["prepbn", "repbn", "unified", "power", "taper"])
def test_a_converted_model_is_traced_without_a_warning(to: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    convert_norms(model, to=to)
    model(torch.randn(3, 5, 4))
    example = torch.randn(3, 5, 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Converting a tensor to a Python")
        traced = torch.jit.trace(model.eval(), example)
    other = torch.randn(2, 7, 4)
    torch.testing.assert_close(traced(other), model(other))
