"""A small LightningModule for the tests of the progressive callback, and the Trainer of all callbacks' tests."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stabnorm.switch.lam import progressive_norms

BATCHES, SIZE, WIDTH = 12, 4, 24


class Sentences(Dataset[dict[str, Tensor]]):
    """Always the same; padded with garbage."""

    def __len__(self) -> int:
        return SIZE * BATCHES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(6, WIDTH, generator=generator)
        length = 3 + index % 4
        target = x[:length].mean(0)
        x[length:] = 1e4
        return {"x": x, "mask": torch.arange(6) < length, "y": target}


class Heavy(nn.Module):
    """Gives each token a scale of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(1.5 * torch.linspace(-2, 2, x.shape[1]))[:, None]


class Body:
    """What the modules of both namespaces share."""

    place = "init"
    forwards = 1
    heavy = False
    clean = True
    poison: int | None = None

    def build(self) -> None:
        before = Heavy() if self.heavy else nn.Identity()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), before,
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH),
        )  # fmt: skip

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["mask"][..., None]
        x = torch.where(mask, batch["x"], 0) if self.clean else batch["x"]
        losses = []
        for _ in range(self.forwards):
            out = torch.where(mask, self.net(x), 0).sum(1) / mask.sum(1)
            losses.append((out - batch["y"]).square().mean())
        return torch.stack(losses).mean()


def module(namespace: str = "pytorch_lightning", **attributes: Any) -> Any:
    base: Any = importlib.import_module(namespace).LightningModule

    class Module(Body, base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for name, value in attributes.items():
                setattr(self, name, value)
            self.losses: list[float] = []
            self.lams: list[list[float]] = []
            self.at: list[int] = []
            self.validated: list[list[float]] = []
            if self.place == "init":
                self.build()

        def setup(self, stage: str) -> None:
            if self.place == "setup" and not hasattr(self, "net"):
                self.build()

        def configure_model(self) -> None:
            if self.place == "configure_model" and not hasattr(self, "net"):
                self.build()

        def lam(self) -> list[float]:
            return [float(norm.lam) for norm in progressive_norms(self).values()]

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if batch_idx == self.poison:
                raise RuntimeError("boom")
            loss = self.loss(batch)
            self.at.append(self.trainer.global_step)
            self.lams.append(self.lam())
            self.losses.append(float(loss.detach()))
            return loss

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.log("val/loss", self.loss(batch))
            self.validated.append(self.lam())

        test_step = validation_step

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Module()


def loader(**options: Any) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Sentences(), **{"batch_size": SIZE, **options})


def trainer(tmp_path: Path, *callbacks: Any, namespace: str = "pytorch_lightning", **options: Any) -> Any:
    defaults: dict[str, Any] = dict(
        default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=1, callbacks=list(callbacks),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(namespace).Trainer(**{**defaults, **options})


def fit(run: Any, model: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning.*")
        warnings.filterwarnings("ignore", message=".*tensorboard.*")
        run.fit(model, loader(), loader(), **options)
