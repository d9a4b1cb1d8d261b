"""Compare the norm modules with nn.LayerNorm and the published code: `python -m benchmarks.norm_modules`.

All modules run in one process, in training mode, and after any warm-up. In each round every module runs once, forward
and backward, in a random order, so that other load on the machine affects all alike. The figures are ratios within a
round: the median, and the interquartile range of the rounds. PRepBN has lam = 0.5. The input is ``[rows, channels]``,
and for the published modules (those of `stabnorm.nn.official`) ``[64, rows / 64, channels]``.

On a CPU, glibc by default gets new memory from the system for every output. `MALLOC_MMAP_THRESHOLD_=2000000000
MALLOC_TRIM_THRESHOLD_=4000000000` in the environment prevents this; the first line of the output says which one ran.

Args: --rounds N, --threads N, --shapes ROWSxCHANNELS ..., --dtype float32 bfloat16, --device cpu|cuda, --no-compile.
"""

import argparse
import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.rounds import in_turn
from stabnorm.nn.official import OfficialPowerNorm, OfficialPRepBN, OfficialRepBN, OfficialUnifiedNorm

WARM_UP = 8  # rounds; fills every window and compiles
INPUTS = 3  # taken in turn, so that moving averages have something to average
BATCH = 64
HEAD = 64  # channels per group of PowerNorm's GroupScaling, as many groups as heads


@dataclass
class Variant:
    """One way to normalise, and its times."""

    name: str
    module: Callable[[Tensor], Tensor]
    published: str | None = None  # the name of the published formulation of the same thing
    batched: bool = False  # takes [B, N, C] only
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)


def variants(channels: int, dtype: torch.dtype, device: torch.device, compiled: bool) -> list[Variant]:
    """Return all modules, nn.LayerNorm first."""
    chosen: list[Variant] = []

    def add(name: str, module: nn.Module, published: str | None = None) -> None:
        module.to(device, dtype)
        chosen.append(Variant(name, module, published, batched=name.startswith("published")))

    def add_ours(label: str, name: str, **options: object) -> nn.Module | None:
        cls = getattr(importlib.import_module("stabnorm.nn"), name, None)
        if cls is None:
            return None
        module: nn.Module = cls(channels, **options)
        add(label, module, f"published {name}")
        return module

    add("nn.LayerNorm", nn.LayerNorm(channels))
    add("nn.RMSNorm", nn.RMSNorm(channels))
    add_ours("RepBN", "RepBN")
    add_ours("UnifiedNorm", "UnifiedNorm", warmup_steps=0)
    for label in ("PRepBN, eager", "PRepBN, compiled")[: 2 if compiled else 1]:
        module = add_ours(label, "PRepBN")
        if module is not None:
            module.get_buffer("lam").fill_(0.5)
            if label.endswith("compiled"):
                chosen[-1].module = torch.compile(module, fullgraph=True, dynamic=False)
    add_ours("PowerNorm", "PowerNorm", groups=max(1, channels // HEAD), warmup_steps=0)
    add_ours("PowerNorm, no groups", "PowerNorm", warmup_steps=0)
    add("published RepBN", OfficialRepBN(channels))
    add("published UnifiedNorm", OfficialUnifiedNorm(channels, warmup_steps=WARM_UP - 2, filtration=True))
    halfway = OfficialPRepBN(channels, total_steps=10**6)
    halfway.iter //= 2
    add("published PRepBN", halfway)
    add("published PowerNorm", OfficialPowerNorm(channels, max(1, channels // HEAD), warmup_steps=0))
    return chosen


def measure(rows: int, channels: int, dtype: torch.dtype, options: argparse.Namespace) -> list[Variant]:
    """Run the rounds."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    spread = torch.randn(channels).mul(0.5).exp()  # channels of different scale, or UN's published filter always fires
    inputs = [(torch.randn(rows, channels) * spread).to(device, dtype) for _ in range(INPUTS)]
    upstream = torch.randn(rows, channels).to(device, dtype)
    everything = variants(channels, dtype, device, not options.no_compile)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(variant: Variant, x: Tensor) -> tuple[float, float]:
        shape = (BATCH, rows // BATCH, channels) if variant.batched else (rows, channels)
        x = x.view(shape).detach().requires_grad_()
        start = now()
        y = variant.module(x)
        middle = now()
        y.backward(upstream.view(shape).to(y.dtype))
        return middle - start, now() - start

    for number in range(WARM_UP + options.rounds):
        for variant in in_turn(everything, number):
            forward, both = run(variant, inputs[number % INPUTS])
            if number >= WARM_UP:
                variant.forward.append(forward)
                variant.both.append(both)
        if sys.stderr.isatty():
            print(f"\rround {number + 1} of {WARM_UP + options.rounds}", end="", file=sys.stderr)
    return everything


def table(everything: Sequence[Variant]) -> str:
    """Return the figures as Markdown."""
    base, by_name = everything[0], {variant.name: variant for variant in everything}
    lines = [
        f"nn.LayerNorm: forward {1e3 * statistics.median(base.forward):.2f} ms, "
        f"forward + backward {1e3 * statistics.median(base.both):.2f} ms",
        "",
        "| module | forward, x LayerNorm | forward + backward, x LayerNorm | forward + backward, published / this |",
        "|---|---:|---:|---:|",
    ]
    for variant in everything[1:]:
        published = by_name.get(variant.published or "")
        faster = "" if published is None else _ratio(published.both, variant.both)
        forward, both = _ratio(variant.forward, base.forward), _ratio(variant.both, base.both)
        lines.append(f"| {variant.name} | {forward} | {both} | {faster} |")
    return "\n".join(lines)


def _ratio(these: Sequence[float], those: Sequence[float]) -> str:
    """Return the median ratio within a round, and the interquartile range of the rounds."""
    ratios = [a / b for a, b in zip(these, those, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def _shape(text: str) -> tuple[int, int]:
    try:
        rows, channels = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no ROWSxCHANNELS such as 8192x384") from None
    if rows % BATCH or rows <= 0 or channels <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: rows must be a positive multiple of {BATCH}, channels positive")
    return rows, channels


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[(8192, 384), (16384, 768)])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled PRepBN out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    allocation = "keeps freed memory" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "glibc's default"
    print(
        f"{options.rounds} rounds on {options.device} ({options.threads} threads, {platform.machine()}, "
        f"allocation: {allocation}), torch {torch.__version__}"
    )
    for rows, channels in options.shapes:
        for dtype in options.dtype:
            print(f"\n{rows} x {channels}, {dtype}\n")
            print(table(measure(rows, channels, getattr(torch, dtype), options)))


if __name__ == "__main__":
    main()
