"""A small model that is trained in many ways which must all give one history: of a whole batch, in one process, eager.

Half of each batch has mean 3 and the other half -3, so that two processes with a half each see different data.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabnorm import StabilityMonitor, valid_tokens
from stabnorm.monitor.statistics import CATALOGUE

STEPS, BATCH, LENGTH, WIDTH = 7, 8, 5, 13
History = dict[str, Tensor]


class Block(nn.Module):
    """Norms with gain and bias, with a gain, and with neither, unless `bare` is False; as if trained a while."""

    def __init__(self, bare: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.bare = nn.LayerNorm(WIDTH, elementwise_affine=False) if bare else nn.Identity()
        self.mix, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for parameter in (self.norm1.weight, self.norm1.bias, self.norm2.weight):
            nn.init.normal_(parameter, 1.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        x = x + self.mlp(nn.functional.gelu(self.bare(x)))
        y: Tensor = self.norm2(x)
        return y


class Net(nn.Module):
    """Two blocks, each under activation checkpointing if asked for."""

    def __init__(self, recompute: str = "off", *, bare: bool = True) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.blocks = nn.Linear(4, WIDTH), nn.ModuleList(Block(bare) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            if self.recompute == "off":
                h = block(h)
            else:
                h = checkpoint(block, h, use_reentrant=self.recompute == "reentrant")
        y: Tensor = self.head(self.norm(h))
        return y


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, LENGTH, 4, generator=generator)
    x[: BATCH // 2] += 3
    x[BATCH // 2 :] -= 3
    mask = torch.rand(BATCH, LENGTH, generator=generator) < 0.8
    return x, mask, torch.randn(BATCH, LENGTH, 3, generator=generator)


def train(
    model: nn.Module,
    run: Callable[[Tensor], Tensor] | None = None,
    *,
    rank: int = 0,
    ranks: int = 1,
    parts: int = 1,
    scale: float = 1.0,
    monitor: StabilityMonitor | None = None,
) -> History:
    """The history of a few optimizer steps.

    Args:
        model: what is watched.
        run: what is called. Default: the model.
        rank, ranks: whose share of each batch.
        parts: micro-batches of a step.
        scale: the loss scale.
        monitor: the watch. Default: one of everything.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = monitor or everything(model)
    call = model if run is None else run
    share = BATCH // ranks
    with monitor:
        for step in range(STEPS):
            tensors = [t[rank * share :][:share].chunk(parts) for t in batch(step)]
            losses = []
            for x, mask, target in zip(*tensors, strict=True):
                with valid_tokens(mask):
                    loss = call(x).sub(target).square().mean() / parts
                    (scale * loss).backward()
                losses.append(loss.detach())
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=torch.stack(losses).sum(), grad_scale=scale)
    return monitor.history() | {
        name: values for track in monitor.companions.values() for name, values in track.history().items()
    }


def everything(model: nn.Module, *, fused: bool = False) -> StabilityMonitor:
    """A monitor of all statistics that norms have."""
    return StabilityMonitor(model, list(CATALOGUE), flush_every=3, companions=["switch"], fused=fused)


def assert_same(got: History, want: History) -> None:
    """To 1e-6 of a statistic's natural scale: 1 where it is dimensionless, else the layer's rms, its square, its number
    of tokens, or the size of its gradients. What only several processes have is left out."""
    rms = want["amax"] / want["crest"]
    size = {"1": torch.ones_like(rms), "x": rms, "x^2": rms.square(), "token": want["tokens"]}
    size["gradient"] = want["grad_gain"].nan_to_num(1)
    assert got.keys() == want.keys()
    for name in want.keys() - {"rank_share"}:
        values = want[name]
        scale: Any = size[CATALOGUE[name].unit] if name in CATALOGUE else 1
        off = f"{name} is off by {((got[name] - values) / scale).abs().nan_to_num().max():.3g}"
        torch.testing.assert_close(got[name] / scale, values / scale, rtol=0, atol=1e-6, equal_nan=True, msg=off)
