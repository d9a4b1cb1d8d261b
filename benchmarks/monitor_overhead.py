"""Measure what monitoring adds to a training step: `python -m benchmarks.monitor_overhead`.

Each round takes one bare step and one step with each preset, in a random order and in one process, so that other load
on the machine affects all alike. Each monitor stays on a copy of the model, as in a training. There are two figures for
each preset:

* own time: the time in hooks, `step()` and flush, as a share of the bare step. With "fused", norms and statistics are
  computed together, so the time of the norms' own forwards is subtracted; it is measured in a step of its own;
* difference: the difference to the bare step of the same round (median, and the interquartile range of the rounds).

A companion is measured in addition to the economy preset: its own time, and the difference to a step with economy. With
--peers other tools are measured, too, see `benchmarks.peers`.

Args: --model vit-tiny|vit-small, --rounds N, --batch N, --threads N, --dtype float32|bfloat16, --device cpu|cuda,
--peers.
"""

import argparse
import copy
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.peers import peers
from benchmarks.rounds import in_turn
from stabnorm import StabilityMonitor, find_norms
from stabnorm.companions.companion import Companion
from stabnorm.companions.embedding import EmbeddingCompanion
from stabnorm.ops.dispatch import REFERENCE
from stabnorm.ops.observed import norm_with_moments

FLUSH_EVERY = 10
WARM_UP = 3
# ViT's first layer is no nn.Embedding, and goes by its name.
COMPANIONS: tuple[str | Companion, ...] = (
    "attention",
    "weights",
    EmbeddingCompanion(include="patches.weight"),
    "output",
)
NORMS = "norms alone"
WIDTHS = {"vit-tiny": (192, 3), "vit-small": (384, 6)}


class Block(nn.Module):
    """A Pre-LN transformer block; if it is causal, no token sees later tokens."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and MLP, each of the normalised input."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """ViT on 224 x 224 images with patches of 16: 12 layers, 197 tokens, 25 norms."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 197, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the class token."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class Watcher(Protocol):
    """A tool with hooks on a model that counts its own time: a `StabilityMonitor` or a peer."""

    @property
    def seconds(self) -> float:
        """Seconds spent so far."""

    def attach(self) -> None:
        """Put the hooks on."""

    def detach(self) -> None:
        """Take them off."""

    def step(self, *, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """End a step."""


class NormClock:
    """Measures the time of the forwards of a model's norms."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds, self._start = 0.0, 0.0
        self._norms = [layer.module for layer in find_norms(model)]
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Put the hooks on."""

        def begin(*_: object) -> None:
            self._start = time.perf_counter()

        def end(*_: object) -> None:
            self.seconds += time.perf_counter() - self._start

        for norm in self._norms:
            self._handles += [norm.register_forward_pre_hook(begin), norm.register_forward_hook(end)]

    def detach(self) -> None:
        """Take them off."""
        while self._handles:
            self._handles.pop().remove()

    def step(self, *, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing at the end of a step."""


@dataclass
class Variant:
    """One way to take a step, and its times."""

    name: str
    model: nn.Module
    monitor: Watcher | None
    seconds: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)  # in hooks, step and flush, of the step
    companion: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    @property
    def stays(self) -> bool:
        """Whether the tool stays on its model between its steps; the others share one model."""
        return isinstance(self.monitor, StabilityMonitor)


def measure(options: argparse.Namespace) -> list[Variant]:
    """Run the rounds; return the bare variant first."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    model = ViT(*WIDTHS[options.model]).to(device)
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    labels = torch.randint(1000, (options.batch,), device=device)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def step(variant: Variant) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(variant.model(images), labels)
        variant.optimizer.zero_grad()
        loss.backward()
        variant.optimizer.step()
        if variant.monitor is not None:
            variant.monitor.step(loss=loss, optimizer=variant.optimizer)

    def watched(name: str, preset: str, fused: bool = False, companion: bool = False, **more: Any) -> Variant:
        own = copy.deepcopy(model)
        monitor = StabilityMonitor(own, preset, flush_every=FLUSH_EVERY, fused=fused, **more)
        return Variant(name, own, monitor, fused=fused, companion=companion)

    variants = [Variant("bare", model, None)]
    variants += [watched(preset, preset) for preset in ("economy", "standard", "full")]
    variants.append(watched("standard, no gradients", "standard", gradients=False))
    if norm_with_moments.chosen(images) != REFERENCE:
        variants.append(Variant(NORMS, model, NormClock(model)))
        variants += [watched(f"{preset}, fused", preset, fused=True) for preset in ("economy", "standard")]
    for asked in COMPANIONS:
        name = asked if isinstance(asked, str) else asked.name
        variants.append(watched(name, "economy", companion=True, companions=[asked]))
    others = peers(model) if options.peers else []
    variants += [Variant(peer.name, model, peer) for peer in others]
    staying = [variant.monitor for variant in variants if variant.stays and variant.monitor is not None]
    for monitor in staying:
        monitor.attach()
    for number in range(WARM_UP + options.rounds):
        for variant in in_turn(variants, number):
            before = _inside(variant)
            if variant.monitor is not None and not variant.stays:
                variant.monitor.attach()
            synchronize()
            start = time.perf_counter()
            step(variant)
            synchronize()
            took = time.perf_counter() - start
            if variant.monitor is not None and not variant.stays:
                variant.monitor.detach()
            if number >= WARM_UP:
                variant.seconds.append(took)
                variant.inside.append(_inside(variant) - before)
        if sys.stderr.isatty():
            print(f"\rround {number + 1} of {WARM_UP + options.rounds}", end="", file=sys.stderr)
    for monitor in staying:
        monitor.detach()
    for peer in others:
        peer.close()
    return variants


def _inside(variant: Variant) -> float:
    monitor = variant.monitor
    if variant.companion and isinstance(monitor, StabilityMonitor):
        return monitor.companions.seconds
    return 0.0 if monitor is None else monitor.seconds


def table(variants: Sequence[Variant]) -> str:
    """Return the figures as Markdown."""
    presets = [variant for variant in variants if not variant.companion and variant.name != NORMS]
    bare = variants[0].seconds
    norms = next((_usual(variant) for variant in variants if variant.name == NORMS), 0.0)
    usual = statistics.median(bare)
    lines = [
        f"bare step: {1e3 * usual:.0f} ms (quartiles {1e3 * _quarter(bare, 1):.0f} to {1e3 * _quarter(bare, 3):.0f})",
        "",
        "| preset, at every step | own time, ms | own time, % of the bare step | difference, % (quartiles) |",
        "|---|---:|---:|---:|",
        *_rows(presets[1:], usual, bare, norms),
        "",
        "| companion, at every step | own time, ms | own time, % of the bare step | difference to economy, % |",
        "|---|---:|---:|---:|",
        *_rows([v for v in variants if v.companion], usual, variants[1].seconds),
    ]
    return "\n".join(lines)


def _rows(variants: Sequence[Variant], usual: float, base: Sequence[float], norms: float = 0.0) -> list[str]:
    lines = []
    for variant in variants:
        inside = _usual(variant) - (norms if variant.fused else 0.0)
        differences = [100 * (a - b) / b for a, b in zip(variant.seconds, base, strict=True)]
        lines.append(
            f"| {variant.name} | {1e3 * inside:.1f} | {100 * inside / usual:.1f} "
            f"| {statistics.median(differences):+.1f} "
            f"({_quarter(differences, 1):+.1f} to {_quarter(differences, 3):+.1f}) |"
        )
    return lines


def _usual(variant: Variant) -> float:
    """Return the mean without the slowest twentieth; no median, because only every tenth step has a flush."""
    return statistics.fmean(sorted(variant.inside)[: -max(1, len(variant.inside) // 20)])


def _quarter(values: Sequence[float], which: int) -> float:
    return statistics.quantiles(values, n=4)[which - 1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(WIDTHS), default="vit-tiny")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", action="store_true", help="measure other tools, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(
        f"{options.model}, batch {options.batch}, {options.dtype}, {options.rounds} rounds on {options.device} "
        f"({options.threads} threads, {platform.machine()}), torch {torch.__version__}"
    )
    print(table(measure(options)))


if __name__ == "__main__":
    main()
