"""Converted in a user's own `__init__` or `configure_model`, a LightningModule trains, saves, loads and resumes."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabnorm import convert_norms
from stabnorm.nn import PRepBN, no_decay_groups


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.build()

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss: Tensor = (self.net(x) - y).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(no_decay_groups(self, 0.01), lr=0.01)


class InInit(Plain):
    def build(self) -> None:
        super().build()
        convert_norms(self)


class InConfigureModel(Plain):
    def build(self) -> None:
        pass

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            super().build()
        convert_norms(self)  # Lightning may call this again: it is idempotent


def trainer(folder: Path, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def batches() -> DataLoader[Any]:
    x, y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).split([4, 1], dim=1)
    return DataLoader(TensorDataset(x, y), batch_size=4)


@pytest.mark.parametrize("module", [InInit, InConfigureModel])
def test_it_trains_saves_loads_and_resumes(module: type[Plain], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, run = module(), trainer(tmp_path, 1)
    run.fit(model, batches())
    norm = model.net[1]
    assert isinstance(norm, PRepBN)
    assert norm.rep.step == 3
    norm.lam.fill_(0.5)
    run.save_checkpoint(tmp_path / "half.ckpt")

    loaded = module.load_from_checkpoint(tmp_path / "half.ckpt")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name

    resumed, again = module(), trainer(tmp_path, 2)
    again.fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert isinstance(resumed.net[1], PRepBN)
    assert resumed.net[1].lam == 0.5
    assert resumed.net[1].rep.step == 6


@pytest.mark.parametrize("module", [InInit, InConfigureModel])
def test_it_loads_a_checkpoint_from_before_it_was_converted(module: type[Plain], tmp_path: Path) -> None:
    plain, run = Plain(), trainer(tmp_path, 1)
    run.fit(plain, batches())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    model = module.load_from_checkpoint(tmp_path / "plain.ckpt")
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(model.eval().net(x), plain.eval().net(x))


@pytest.mark.parametrize("missing", ["rep.eta", "lam", "rep.running_var"])
def test_a_checkpoint_with_only_a_part_of_what_was_added_is_an_error(missing: str) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    convert_norms(model)
    state = model.state_dict()
    del state[f"1.{missing}"]
    with pytest.raises(RuntimeError, match=f'Missing key\\(s\\) in state_dict: "1.{missing}"'):
        model.load_state_dict(state)


def test_a_checkpoint_may_be_of_a_model_that_was_converted_in_part() -> None:
    part, whole = (nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8)) for _ in range(2))
    convert_norms(part, include="0")
    nn.init.normal_(part[0].rep.weight)  # type: ignore[union-attr, arg-type]
    convert_norms(whole)
    state = part.state_dict()
    whole.load_state_dict(state)
    assert torch.equal(whole[0].rep.weight, part[0].rep.weight)  # type: ignore[union-attr, arg-type]


def test_what_is_loaded_is_not_added_to() -> None:
    norm, state = nn.LayerNorm(8), nn.LayerNorm(8).state_dict()
    convert_norms(norm)
    norm.load_state_dict(state)
    assert list(state) == ["weight", "bias"]
    assert list(state._metadata) == [""]  # type: ignore[attr-defined]


def test_assigning_a_checkpoint_works_as_well() -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    convert_norms(plain)
    convert_norms(model)
    model.load_state_dict(plain.state_dict(), assign=True)
    x = torch.randn(3, 4)
    assert torch.equal(model(x), plain(x))
    model.load_state_dict(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)).state_dict(), assign=True)
    assert isinstance(model[1].rep.weight, nn.Parameter)  # type: ignore[union-attr]
