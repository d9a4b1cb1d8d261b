"""A training with a batch norm whose batches can be spoilt, and what a step must leave as it was."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor

WIDTH = 8


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH),
        nn.Dropout(0.1), nn.Linear(WIDTH, 1),
    )  # fmt: skip


def batches(count: int, *, spoilt: Sequence[int] = ()) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(16, 4, generator=generator) for _ in range(count)]
    for index in spoilt:
        made[index][3, 1] = torch.nan
    return made


def with_a_past(monitor: StabilityMonitor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Tell the monitor what loss, gradient and inputs of `net` were in so many steps that spikes are looked for."""
    generator = torch.Generator().manual_seed(2)
    for noise in torch.randn(256, 4, generator=generator):
        usual = (torch.tensor([0.3, 0.3, 2.0, 2.5]) * (0.3 * noise).exp()).tolist()
        for optimizer in optimizers:
            assert monitor._spikes.judge([optimizer], usual) is None


def everything(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and all tensors of the optimizers, copied."""
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                kept[f"{number}.{index}.{name}"] = torch.as_tensor(value).clone()
    return kept


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
