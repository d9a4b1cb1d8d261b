"""What belongs to a step counts, whole and once: validations, left epochs, threads, checkpoints, and swapped norms."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from stabnorm import StabilityMonitor
from stabnorm.callbacks import StabilityCallback

SIZE, ACCUMULATED = 4, 4


class Module(pl.LightningModule):
    """Validates with dropout on, in the middle of an accumulation; and may leave an epoch there."""

    def __init__(self, *, leaves: bool = False) -> None:
        super().__init__()
        self.net, self.leaves = (
            nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 1)),
            leaves,
        )

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def on_train_batch_start(self, batch: Any, index: int) -> int | None:
        return -1 if self.leaves and self.current_epoch == 0 and index == 6 else None

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.train()
        self.net(1000 * batch)

    def on_validation_model_train(self) -> None:
        self.train()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)

    def loader(self, batches: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(torch.randn(SIZE * batches, 4, generator=generator), batch_size=SIZE)  # type: ignore[arg-type]


def fitted(module: Module, folder: Path, **options: Any) -> dict[str, Tensor]:
    callback = StabilityCallback()
    trainer = pl.Trainer(
        default_root_dir=folder, accelerator="cpu", max_epochs=2, accumulate_grad_batches=ACCUMULATED, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[callback],
        **options,
    )  # fmt: skip
    trainer.fit(module, module.loader(8), module.loader(2))
    assert callback.monitor is not None
    return callback.monitor.history()


def test_a_validation_with_dropout_in_the_middle_of_an_accumulation_does_not_count(tmp_path: Path) -> None:
    history = fitted(Module(), tmp_path, val_check_interval=2)
    assert history["tokens"][:, 0].tolist() == [SIZE * ACCUMULATED] * 4
    assert history["amax"].max() < 100


def test_an_epoch_left_in_the_middle_of_an_accumulation_is_forgotten(tmp_path: Path) -> None:
    history = fitted(Module(leaves=True), tmp_path, limit_val_batches=0)
    assert history["tokens"][:, 0].tolist() == [SIZE * ACCUMULATED] * 3


def test_a_pause_keeps_the_open_step_of_norms_and_companions() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    with StabilityMonitor(model, "full", companions=["attention", "output"]) as monitor:
        model(torch.randn(2, 5, 8))
        with monitor.paused():
            model(1000 * torch.randn(7, 5, 8)).sum().backward()
        model(torch.randn(3, 5, 8))
        monitor.step()
    assert monitor.history()["tokens"].tolist() == [[25, 25]]
    assert monitor.history()["grad_gain"].isnan().all()
    assert monitor.companions["attention"].history()["attention_logit_max"].max() < 100


@pytest.mark.parametrize("preset", ["standard", "full"])
def test_several_threads_through_one_model_lose_no_token(preset: str) -> None:
    model = nn.Sequential(nn.LayerNorm(64), nn.GroupNorm(4, 64), nn.LayerNorm(64, elementwise_affine=False))
    forwards, threads = 12, 4
    data = torch.randn(threads, forwards, 8, 64, generator=torch.Generator().manual_seed(0))

    def train(of_thread: Tensor) -> None:
        for x in of_thread:
            model(x).sum().backward()

    histories = []
    for together in (True, False):
        with StabilityMonitor(model, preset, gradients=False) as monitor:
            for _ in range(2):
                if together:
                    workers = [threading.Thread(target=train, args=(part,)) for part in data]
                    for worker in workers:
                        worker.start()
                    for worker in workers:
                        worker.join()
                else:
                    train(data.flatten(0, 1))
                monitor.step()
        histories.append(monitor.history())
    assert histories[0]["tokens"].tolist() == [[threads * forwards * 8] * 3] * 2
    for name, values in histories[1].items():
        torch.testing.assert_close(histories[0][name], values, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("preset", ["standard", "full"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_in_a_compiled_model_trains_as_it_does_unwatched(
    backend: str, preset: str, reentrant: bool
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.block, self.last = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(checkpoint(self.block, x, use_reentrant=reentrant))  # type: ignore[no-untyped-call]
            return y

    x, gradients = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), []
    for watched in (False, True):
        torch._dynamo.reset()
        net = Net()
        monitor = StabilityMonitor(net, preset, companions=["output"])
        if watched:
            monitor.attach()
        for _ in range(2):
            net.zero_grad()
            torch.compile(net, backend=backend)(x.clone().requires_grad_()).square().mean().backward()
            if watched:
                monitor.step()
        gradients.append([parameter.grad for parameter in net.parameters()])
        monitor.detach()
    assert monitor.history()["tokens"].tolist() == [[4, 4], [4, 4]]
    for plain, seen in zip(*gradients, strict=True):
        assert plain is not None
        assert seen is not None
        assert torch.equal(plain, seen)


def test_a_norm_that_is_swapped_or_added_later_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ModuleList())
    with StabilityMonitor(model, flush_every=2) as monitor, caplog.at_level(logging.WARNING):
        for step in range(12):
            if step == 3:
                model[1] = nn.RMSNorm(8)
            if step == 7:
                model[2].append(nn.LayerNorm(8))  # type: ignore[operator]
            if step == 9:
                model[0] = nn.Linear(4, 8)  # no norm
            model[:2](torch.randn(5, 4))
            monitor.step()
    said = [record.getMessage() for record in caplog.records if "is not watched" in record.getMessage()]
    assert len(said) == 2
    assert "1 left the model, and 1 came into it" in said[0]
    assert "2.0 came into it" in said[1]
