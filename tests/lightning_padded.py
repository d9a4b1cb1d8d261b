"""A LightningModule over padded sentences, in both namespaces, for the tests of `StabilityCallback`."""

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stabnorm import StabilityMonitor
from stabnorm.callbacks import StabilityCallback
from stabnorm.monitor.record import Record, read_record

BATCHES = 12


class Batches(Dataset[dict[str, Tensor]]):
    """Sentences of random length, padded with garbage."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        length = 2 + index % 4
        x = torch.randn(6, 8, generator=generator)
        x[length:] = 1e6
        return {"x": x, "mask": torch.arange(6) < length, "y": x[:length].mean(0)}


class Body:
    """What the modules of both namespaces share."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.RMSNorm(8), nn.Linear(8, 8))
        self.losses: list[float] = []
        self.poison: int | None = None

    def loss(self, batch: dict[str, Tensor], index: int) -> Tensor:
        mask = batch["mask"][..., None]
        x = torch.where(mask, batch["x"], 0) if self.clean else batch["x"]
        if index == self.poison:
            raise RuntimeError("boom")
        out = torch.where(mask, self.net(x), 0).sum(1) / mask.sum(1)
        return (out - batch["y"]).square().mean()

    clean = True


def module(namespace: str = "pytorch_lightning", **attributes: Any) -> Any:
    base: Any = importlib.import_module(namespace).LightningModule

    class Module(Body, base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.build()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss = self.loss(batch, batch_idx)
            self.losses.append(loss.detach())  # type: ignore[arg-type]
            return loss

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.net(1e9 * batch["x"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    torch.manual_seed(0)
    made = Module()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Batches(), batch_size=4)


def fit(run: Any, model: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning.*")
        warnings.filterwarnings("ignore", message=".*tensorboard.*")
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # torch, of RMSNorm
        run.fit(model, loader(), loader(), **options)


def watched(callback: StabilityCallback) -> StabilityMonitor:
    assert callback.monitor is not None
    return callback.monitor


def record_of(callback: StabilityCallback) -> Record:
    assert callback.directory is not None
    return read_record(callback.directory)
