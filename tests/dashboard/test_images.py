from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from stabnorm.dashboard.images import log_image

IMAGE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


class _DummyExperiment:
    """As Lightning's on other ranks: takes any call."""

    def add_image(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError


class Spy:
    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


def test_tensorboard_shows_it(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        assert log_image(SimpleNamespace(experiment=writer), "stability/amax", IMAGE, 7, tmp_path / "files")
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    (event,) = accumulator.Images("stability/amax")
    assert (event.step, event.width, event.height) == (7, 3, 2)
    assert not (tmp_path / "files").exists()


def test_each_logger_is_called_in_its_own_way(tmp_path: Path) -> None:
    wandb, mlflow, comet = Spy(), Spy(), Spy()
    assert log_image(wandb, "stability/amax", IMAGE, 7, tmp_path)
    assert log_image(SimpleNamespace(experiment=mlflow, run_id="run"), "stability/amax", IMAGE, 7, tmp_path)
    assert log_image(SimpleNamespace(experiment=comet), "stability/amax", IMAGE, 7, tmp_path)
    assert wandb.calls == [(("stability/amax", [IMAGE]), {"step": 7})]
    assert mlflow.calls == [(("run", IMAGE), {"key": "stability_amax", "step": 7})]
    assert comet.calls == [((IMAGE,), {"name": "stability/amax", "step": 7})]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("logger", [None, SimpleNamespace(), SimpleNamespace(experiment=object())])
def test_where_no_logger_takes_it_there_is_a_file(tmp_path: Path, logger: object) -> None:
    assert not log_image(logger, "stability/amax", IMAGE, 7, tmp_path / "new")
    with Image.open(tmp_path / "new" / "stability_amax_00000007.png") as image:
        np.testing.assert_array_equal(np.asarray(image), IMAGE)


def test_a_dummy_logger_writes_nothing(tmp_path: Path) -> None:
    assert not log_image(SimpleNamespace(experiment=_DummyExperiment()), "stability/amax", IMAGE, 7, tmp_path)
    assert not list(tmp_path.iterdir())
