"""Companions on a Trainer: pictures, alerts in the closing table, resume, and nothing changed."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from stabnorm.callbacks import StabilityCallback
from stabnorm.callbacks._outputs import HeadlineScalars
from stabnorm.companions.embedding import EmbeddingCompanion
from stabnorm.monitor.record import Block, read_record
from tests.companions.nets import DIM, Fused
from tests.lightning_padded import BATCHES, fit, module
from tests.lightning_small import trainer
from tests.watchers import watchers

CHOSEN: list[Any] = ["attention", "weights", EmbeddingCompanion(include="net.0.weight"), "output"]


class Attending(nn.Module):
    """From [batch, 6, 8] to [batch, 6, 8], by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.attention = nn.Linear(8, DIM), nn.LayerNorm(DIM), Fused(causal=False)
        self.last = nn.Linear(DIM, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(x + self.attention(self.norm(x)))
        return out


def attending() -> Any:
    made = module()
    torch.manual_seed(1)
    made.net = nn.Sequential(nn.Linear(8, 8), Attending())
    return made


def test_headline_scalars_are_of_the_norms_blocks_alone() -> None:
    class Logger:
        logged: ClassVar[list[int]] = []

        def log_metrics(self, scalars: dict[str, float], step: int) -> None:
            self.logged.append(step)

    logger = Logger()
    scalars = HeadlineScalars(logger, ["amax"], lambda: 0, lambda: 0.0)
    scalars.write_block(Block(0, ("norm",), {"amax": np.ones((5, 1), np.float32)}))
    scalars.write_block(Block(5, ("0.weight",), {"update_ratio": np.ones((5, 1), np.float32)}, companion="weights"))
    assert logger.logged == [4]


def test_a_trainer_watches_companions_and_changes_no_bit(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    bare, model = attending(), attending()
    fit(trainer(tmp_path), bare)
    logger = TensorBoardLogger(tmp_path)
    callback = StabilityCallback(flush_every=5, mask="mask", companions=CHOSEN)
    fit(trainer(tmp_path, callback, logger=logger, log_every_n_steps=1), model)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    assert watchers(model) == 0
    assert callback.monitor is not None
    companions = callback.monitor.companions
    assert companions["attention"].history()["attention_entropy"].shape == (BATCHES, 3)
    update = companions["weights"].history()
    torch.testing.assert_close(  # Lightning computes the gradient inside of the optimizer's step
        update["effective_learning_rate"] * update["weight_norm"].square(),
        torch.full((BATCHES, 5), 0.05),
        rtol=0.05,
        atol=0,
    )
    assert (update["update_ratio"] > 0).all()
    assert not companions["embedding"].history()["embedding_gradient_ratio"].isnan().any()
    assert companions["output"].rows == ("net.1.last",)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags: Any = events.Tags()
    assert {"stability/attention_entropy", "stability/update_ratio", "stability/output_log_z"} <= set(tags["images"])
    assert len([tag for tag in tags["scalars"] if tag.startswith("stability/")]) <= 12
    assert read_record(logger.log_dir).layers == ("net.1.norm",)
    assert read_record(logger.log_dir, companion="attention").steps.tolist() == list(range(BATCHES))


def test_a_head_over_the_bound_is_in_the_closing_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="stabnorm")
    model = attending()
    with torch.no_grad():
        model.net[1].attention.qkv.weight[: 2 * DIM] *= 60
    fit(trainer(tmp_path, StabilityCallback(companions=["attention"])), model)
    printed = caplog.text
    assert "net.1.attention.head0" in printed
    assert "attention_logit_max" in printed
    assert "its softmax saturates" in printed


def test_errors_come_before_the_first_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'weights'"):
        StabilityCallback(companions=["weight"])
    model = module()
    with pytest.raises(ValueError, match="no attention found in Module"):
        fit(trainer(tmp_path, StabilityCallback(companions=["attention"])), model)
    assert model.losses == []
    assert watchers(model) == 0


@pytest.mark.slow
def test_a_resumed_fit_goes_on_with_the_power_iteration(tmp_path: Path) -> None:
    def run(epochs: int, **options: Any) -> StabilityCallback:
        callback = StabilityCallback(companions=CHOSEN)
        fit(trainer(tmp_path, callback, max_epochs=epochs, enable_checkpointing=True), attending(), **options)
        return callback

    whole = run(2)
    callback = StabilityCallback(companions=CHOSEN)
    first = trainer(tmp_path, callback, max_epochs=1)
    fit(first, attending())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = run(2, ckpt_path=tmp_path / "half.ckpt")
    for name in ("top_singular_value", "update_ratio"):
        a, b = (c.monitor.companions["weights"].history()[name] for c in (whole, resumed) if c.monitor is not None)
        torch.testing.assert_close(a[BATCHES:], b, rtol=1e-5, atol=1e-7)
