"""Optimizers of every kind under Lightning: without a learning rate, with one in a tensor, none at all, and several."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stabnorm import StabilityMonitor
from stabnorm.callbacks import StabilityCallback
from stabnorm.monitor import Record, read_record
from tests.lightning_padded import BATCHES, fit, module
from tests.lightning_small import trainer


def record_of(callback: StabilityCallback) -> Record:
    assert callback.directory is not None
    return read_record(callback.directory)


class WithoutRate(torch.optim.Optimizer):
    """An optimizer whose groups have no learning rate, or something else in its place."""

    def __init__(self, parameters: Any, **defaults: Any) -> None:
        super().__init__(parameters, defaults)

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


class Twice(WithoutRate):
    """An iterative optimizer, which runs its closure more than once in a step."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return closure()


def rates_from_an_iterator(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    groups = optimizer.param_groups

    class Groups(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            raise TypeError("these groups are only iterated over")

    optimizer.param_groups = Groups(groups)
    return optimizer


@pytest.mark.parametrize(
    ("make", "rate", "tokens"),
    [
        (lambda parameters: WithoutRate(parameters), None, 24),
        (lambda parameters: WithoutRate(parameters, lr=None), None, 24),
        (lambda parameters: WithoutRate(parameters, lr=[0.1, 0.2]), None, 24),
        (lambda parameters: torch.optim.SGD(parameters, lr=torch.tensor(0.25)), 0.25, 24),
        (lambda parameters: torch.optim.Rprop(parameters, lr=0.25), 0.25, 24),
        (lambda parameters: Twice(parameters, lr=0.25), 0.25, 48),
        (rates_from_an_iterator, 0.5, 24),
    ],
    ids=["no rate", "None", "a list", "a tensor", "Rprop", "closure twice", "groups to iterate"],
)
def test_any_optimizer_is_recorded_as_far_as_it_says_something(
    tmp_path: Path, make: Any, rate: float | None, tokens: int
) -> None:
    model = module()
    model.table = nn.Embedding(4, 8)
    model.configure_optimizers = lambda: make(model.parameters())
    callback = StabilityCallback("full", flush_every=5, companions=["weights", "embedding"])
    fit(trainer(tmp_path, callback), model)
    record = record_of(callback)
    assert record.steps.tolist() == list(range(BATCHES))
    assert record.series["tokens"][:, 0].tolist() == [tokens] * BATCHES
    if rate is None:
        assert "learning_rate" not in record.series
    else:
        assert record.series["learning_rate"].tolist() == [rate] * BATCHES


class AlmostAdam(WithoutRate):
    """Keeps one second moment for a whole parameter, as some optimizers that save memory do."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter] = {"exp_avg_sq": parameter.grad.square().mean(), "step": torch.tensor(1.0)}
        return loss


@pytest.mark.parametrize("eps", [1e-8, (1e-30, 1e-3), None])
def test_an_optimizer_that_is_almost_adam_has_no_figures_of_adam(tmp_path: Path, eps: Any) -> None:
    model = module()
    model.configure_optimizers = lambda: AlmostAdam(model.parameters(), lr=0.1, betas=(0.9, 0.99), eps=eps)
    callback = StabilityCallback(["amax", "adam_staleness"])
    fit(trainer(tmp_path, callback), model)
    assert callback.monitor is not None
    assert callback.monitor.history()["adam_staleness"].isnan().all()
    assert callback.monitor.history()["amax"].isfinite().all()


def test_lbfgs_counts_its_own_steps(tmp_path: Path) -> None:
    model = module()
    model.configure_optimizers = lambda: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    callback = StabilityCallback()
    fit(trainer(tmp_path, callback), model)
    assert record_of(callback).steps.tolist() == list(range(BATCHES))


@pytest.mark.parametrize("automatic", [True, False])
def test_without_an_optimizer_the_fit_ends_as_it_does_unwatched(tmp_path: Path, automatic: bool) -> None:
    model = module(automatic_optimization=automatic)
    model.configure_optimizers = lambda: None
    callback = StabilityCallback("full", companions=["weights"])
    fit(trainer(tmp_path, callback), model)
    assert callback.monitor is not None
    # Lightning steps a stand-in, which changes nothing, with automatic optimization.
    assert len(callback.monitor.history_steps()) == (BATCHES if automatic else 0)


@pytest.mark.parametrize("tensor", [False, True])
def test_the_learning_rate_is_the_one_that_the_step_used(tmp_path: Path, tensor: bool) -> None:
    model = module()

    def configure() -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(1.0) if tensor else 1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    model.configure_optimizers = configure
    callback = StabilityCallback()
    fit(trainer(tmp_path, callback), model)
    assert record_of(callback).series["learning_rate"].tolist() == [0.5**step for step in range(BATCHES)]


class Rows(torch.utils.data.Dataset[Tensor]):
    """So many rows, each of which has its own number."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), float(index + 1))


@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_the_loss_of_a_short_last_accumulation_is_the_mean_of_its_batches(tmp_path: Path, accumulate: int) -> None:
    class Counting(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = batch.mean() + 0 * self.net(batch).sum()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = StabilityCallback()
    run = trainer(tmp_path, callback, accumulate_grad_batches=accumulate, max_epochs=2, logger=CSVLogger(tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning.*")
        run.fit(Counting(), DataLoader(Rows(7), batch_size=1))
    batches = np.arange(1, 8)
    means = [batches[start : start + accumulate].mean() for start in range(0, 7, accumulate)]
    np.testing.assert_allclose(record_of(callback).series["loss"], 2 * means, rtol=1e-6)


class TwoParts(LightningModule):
    """Two models with an optimizer each, one loss scaler, and a scale that changes between the two steps."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1)) for _ in range(2))

    def training_step(self, batch: Tensor, index: int) -> None:
        for part, optimizer in zip(self.parts, self.optimizers(), strict=True):
            self.manual_backward(part(batch).float().square().mean())
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.0) for part in self.parts]


def test_gradients_of_each_optimizer_are_divided_by_the_loss_scale_at_its_own_step(tmp_path: Path) -> None:
    histories = []
    for scaled in (False, True):
        options: dict[str, Any] = {}
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1, growth_factor=4.0)
            options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
        callback = StabilityCallback(["grad_gain", "grad_shift"])
        run = trainer(tmp_path, callback, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning.*")
            run.fit(TwoParts(), DataLoader(Rows(4), batch_size=2))
        assert callback.monitor is not None
        histories.append(callback.monitor.history())
    for name in ("grad_gain", "grad_shift"):
        torch.testing.assert_close(histories[1][name], histories[0][name], rtol=0.02, atol=1e-4)


def test_in_a_loop_of_your_own_each_optimizer_may_have_its_loss_scale() -> None:
    def parts() -> nn.ModuleList:
        torch.manual_seed(0)
        return nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=affine), nn.Linear(8, 1))
            for affine in (True, False, True)
        )

    def watched(scales: list[float]) -> dict[str, Tensor]:
        model, x = parts(), torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in model]
        with StabilityMonitor(model, ["grad_gain"]) as monitor:
            for part, scale in zip(model, scales, strict=True):
                (scale * part(x).square().mean()).backward()
            monitor.step(grad_scale=dict(zip(optimizers, map(torch.tensor, scales), strict=True)))
        return monitor.history()

    plain, scaled = watched([1.0, 1.0, 1.0]), watched([8.0, 1024.0, 0.5])
    torch.testing.assert_close(scaled["grad_gain"], plain["grad_gain"], rtol=1e-5, atol=0)
    assert plain["grad_gain"].isfinite().all()
