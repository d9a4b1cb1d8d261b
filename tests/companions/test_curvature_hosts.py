"""The curvature along the update on a Trainer, in two processes, and what hosts without it say."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from stabnorm import StabilityMonitor
from stabnorm.callbacks import StabilityCallback
from stabnorm.callbacks.hugging_face import StabilityTrainerCallback
from stabnorm.companions import CurvatureCompanion
from tests.companions.test_curvature import Net, adam, batch, samples, train, watch_of
from tests.lightning_small import trainer
from tests.processes import one_after_the_other, run_ranks

BATCHES = 8


class Counted(nn.Module):
    """A metric, as torchmetrics has them: its state is in attributes that are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.values = torch.zeros(()), list[float]()

    def forward(self, loss: Tensor) -> Tensor:
        self.total += loss.detach()
        self.values.append(loss.item())
        return self.total


class Module(pl.LightningModule):
    """Logs, keeps a metric, takes something out of its batch, and has dropout."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.net, self.metric = Net(dropout), Counted()
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        y = batch.pop("y")
        loss = F.cross_entropy(self.net(batch["x"]), y)
        self.metric(loss)
        self.losses.append(loss.item())
        self.log("loss", loss, on_epoch=True, on_step=False)
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self.parameters())


def loader() -> DataLoader[Any]:
    rows = [dict(zip("xy", pair, strict=True)) for step in range(BATCHES) for pair in zip(*batch(step), strict=True)]
    return DataLoader(rows, batch_size=16)  # type: ignore[arg-type]


def fit(
    folder: Path, watched: bool = True, every: int = 1, dropout: float = 0.2, ckpt_path: Any = None, **options: Any
) -> tuple[Module, StabilityCallback, Any]:
    callback = StabilityCallback(companions=[CurvatureCompanion(every)] if watched else [], flush_every=5)
    host, module = trainer(folder, callback, **options), Module(dropout)
    torch.manual_seed(4)
    host.fit(module, loader(), ckpt_path=ckpt_path)
    return module, callback, host


def samples_of(callback: StabilityCallback) -> Tensor:
    assert callback.monitor is not None
    return samples(callback.monitor)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulated and clipped", "bf16"],
)
def test_a_fit_with_samples_is_bit_for_bit_the_fit_without(options: dict[str, Any], tmp_path: Path) -> None:
    bare, _, plain = fit(tmp_path, watched=False, **options)
    module, callback, host = fit(tmp_path, **options)
    for name, value in bare.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    assert module.losses == bare.losses == bare.metric.values == module.metric.values
    assert torch.equal(module.metric.total, bare.metric.total)
    assert (
        host.callback_metrics["loss_epoch" if "loss_epoch" in host.callback_metrics else "loss"]
        == (plain.callback_metrics["loss_epoch" if "loss_epoch" in plain.callback_metrics else "loss"])
    )
    found = samples_of(callback)
    assert len(found) == BATCHES // options.get("accumulate_grad_batches", 1)
    assert found.isfinite().all()
    assert "log" not in vars(module)


def test_a_trainer_has_the_samples_of_a_plain_loop(tmp_path: Path) -> None:
    _, callback, _ = fit(tmp_path, dropout=0.0)
    torch.testing.assert_close(samples_of(callback), train(Net(), steps=BATCHES)[0], rtol=1e-4, atol=1e-6)


def test_the_loss_is_computed_again_under_the_mask_of_the_batch(tmp_path: Path) -> None:
    from stabnorm._models.masks import mask_for

    class Masked(Module):
        seen: list[bool]

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            self.seen = [*getattr(self, "seen", []), mask_for(batch["x"].shape[:1], "net") is not None]
            masks.append(self.seen[-1])
            return super().training_step(batch, batch_idx)

    masks: list[bool] = []
    callback = StabilityCallback(companions=[CurvatureCompanion(1)], mask=lambda batch: batch["x"][:, 0] < 9)
    trainer(tmp_path, callback).fit(Masked(0.0), loader())
    assert len(masks) > BATCHES
    assert all(masks)


def test_a_fit_that_is_resumed_has_the_samples_of_one_that_was_not(tmp_path: Path) -> None:
    _, whole, _ = fit(tmp_path / "whole", every=3, dropout=0.0, max_epochs=2)
    _, _, host = fit(tmp_path / "half", every=3, dropout=0.0, max_epochs=1)
    host.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, _ = fit(tmp_path / "rest", every=3, dropout=0.0, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    a, b = samples_of(whole)[BATCHES:], samples_of(resumed)
    assert (~b.isnan()).nonzero()[:, 0].tolist() == [0, 3, 6]  # of 16 steps: 2, 5, 8, 11, 14
    torch.testing.assert_close(a, b[-BATCHES:], rtol=1e-6, atol=0, equal_nan=True)


def test_a_module_that_steps_its_own_optimizers_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    module = Manual()
    with pytest.raises(ValueError, match="Manual has automatic_optimization=False"):
        trainer(tmp_path, StabilityCallback(companions=["curvature"])).fit(module, loader())
    assert module.losses == []


def test_hugging_faces_trainer_hands_out_no_loss_and_the_callback_says_so() -> None:
    with pytest.raises(ValueError, match="'curvature' computes the loss of a batch again"):
        StabilityTrainerCallback(companions=["curvature"])


# -- two processes -----------------------------------------------------------------------------------------------------


def one_rank(rank: int, folder: Path) -> None:
    results = {}
    for every in (1, None):
        net = Net(dtype=torch.float64)
        net.body[3] = nn.Identity()  # a batch norm has other statistics on each process
        model = DistributedDataParallel(net)
        optimizer = adam(model.parameters())
        with StabilityMonitor(model, companions=[CurvatureCompanion(every)]) as monitor:
            for step in range(6 if every else 14):
                x, y = (part[8 * rank : 8 * rank + 8] for part in batch(step, dtype=torch.float64))
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                monitor.step(closure=lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))  # type: ignore[misc]
        assert model.require_backward_grad_sync
        weights = torch.cat([p.detach().flatten() for p in net.parameters()])
        results[every] = samples(monitor), weights, watch_of(monitor)._schedule.state_dict()
    torch.save(results, f"{folder}/{rank}.pt")


@one_after_the_other
@pytest.mark.slow
def test_two_processes_have_the_samples_of_one_and_agree_on_the_next(tmp_path: Path) -> None:
    run_ranks(one_rank, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    net = Net(dtype=torch.float64)
    net.body[3] = nn.Identity()
    alone, _ = train(net)
    assert torch.equal(first[1][0], second[1][0])
    torch.testing.assert_close(first[1][0], alone, rtol=1e-3, atol=1e-6)
    assert torch.equal(first[1][1], second[1][1])
    torch.testing.assert_close(first[1][1], torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert first[None][2] == second[None][2]  # the same next step, though each has measured its own time
    assert first[None][0].isfinite().any()
