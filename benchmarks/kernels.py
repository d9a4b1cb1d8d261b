"""Compare the fused reductions with the limit of the memory: `python -m benchmarks.kernels`.

Each op is measured on every backend that can run here, together with plain torch and compiled torch, and with
Liger-Kernel and apex if they are installed. In each round everything runs once. "of the copy" is the bandwidth of the
op (the least number of bytes that it must move, over its time) as a share of the bandwidth of a plain copy of the same
rows in the same round.

Args: --rounds N, --threads N, --shapes ROWSxCHANNELS ..., --dtype float32 bfloat16, --device cpu|cuda, --no-compile.
"""

import argparse
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rounds import in_turn
from stabnorm import functional
from stabnorm.functional import RawMoments, empty_moments
from stabnorm.ops import use_kernels
from stabnorm.ops.dispatch import Op
from stabnorm.ops.moments import accumulate_moments_, add_moments_
from stabnorm.ops.rows import BatchMap, affine_of_rows, gradient_of_rows, moments_of_rows, sums_of_rows
from stabnorm.ops.selftest import backends_of

WARM_UP = 3
Run = Callable[[Tensor, Tensor], object]


@dataclass
class Contender:
    """One way to compute one thing."""

    op: str
    name: str
    passes: int  # the least number of times all rows must be read or written
    run: Run
    setting: str = "auto"
    seconds: list[float] = field(default_factory=list)


def contenders(channels: int, dtype: torch.dtype, device: torch.device, compiled: bool) -> list[Contender]:
    """Return all contenders, the copy first."""
    vectors = torch.randn(4, channels, device=device)
    mean, scale, slope, offset = vectors.unbind()
    of = BatchMap(scale, slope, offset, mean)
    accumulator = RawMoments(*(part[0] for part in empty_moments(1, channels, device)))
    target: dict[torch.Size, Tensor] = {}

    def copy(x: Tensor, dy: Tensor) -> None:
        target.setdefault(x.shape, torch.empty_like(x)).copy_(x)

    def naive(x: Tensor, dy: Tensor) -> object:
        return torch.var_mean(x.float(), 0)

    own_ops: list[tuple[str, Op[..., Any], int, Run]] = [
        ("column moments", moments_of_rows, 1, lambda x, dy: moments_of_rows(x, None, center=True)),
        (
            "monitor, all moments",
            add_moments_,
            1,
            lambda x, dy: accumulate_moments_(x, None, *accumulator, "layer", -1, fresh=True),
        ),
        ("affine map", affine_of_rows, 2, lambda x, dy: affine_of_rows(x, scale, mean)),
        ("upstream sums", sums_of_rows, 2, lambda x, dy: sums_of_rows(dy, x, mean, None)),
        ("input gradient", gradient_of_rows, 3, lambda x, dy: gradient_of_rows(dy, x, None, of)),
    ]
    entries = [Contender("copy", "torch", 2, copy), Contender("column moments", "torch.var_mean", 1, naive)]
    if compiled:
        fused = torch.compile(lambda x: functional.batch_moments(x.float(), None, center=True), dynamic=False)
        entries.append(Contender("column moments", "torch.compile of the formula", 1, lambda x, dy: fused(x)))
    for label, op, passes, run in own_ops:
        entries += [Contender(label, name, passes, run, name) for name in backends_of(op, device)]
    for name, module in layer_norms(channels, dtype, device).items():
        entries.append(Contender("LayerNorm, there and back", name, 5, _there_and_back(module)))
    return entries


def layer_norms(channels: int, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """Return torch's LayerNorm, and the fused ones that are installed."""
    norms: dict[str, nn.Module] = {"torch": nn.LayerNorm(channels)}
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        norms["Liger-Kernel"] = importlib.import_module("liger_kernel.transformers").LigerLayerNorm(channels)
    if device.type == "cuda" and importlib.util.find_spec("apex"):
        norms["apex"] = importlib.import_module("apex.normalization").FusedLayerNorm(channels)
    return {name: module.to(device, dtype) for name, module in norms.items()}


def _there_and_back(module: nn.Module) -> Run:
    def run(x: Tensor, dy: Tensor) -> None:
        module(x.detach().requires_grad_()).backward(dy)

    return run


def measure(rows: int, channels: int, dtype: torch.dtype, options: argparse.Namespace) -> list[Contender]:
    """Run the rounds."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    inputs = [torch.randn(2, rows, channels).to(device, dtype).unbind() for _ in range(3)]
    everything = contenders(channels, dtype, device, not options.no_compile)
    repeat = 10 if device.type == "cuda" else 1  # a launch costs as much as a small kernel

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for number in range(WARM_UP + options.rounds):
        for contender in in_turn(everything, number):
            with use_kernels(contender.setting):
                start = now()
                for i in range(repeat):
                    contender.run(*inputs[(number + i) % len(inputs)])
                took = (now() - start) / repeat
            if number >= WARM_UP:
                contender.seconds.append(took)
    return everything


def table(everything: Sequence[Contender], size: int) -> str:
    """Return the figures as Markdown; `size` is that of all rows in bytes."""
    lines = ["| op | backend | us (interquartile range) | GB/s | of the copy |", "|---|---|---:|---:|---:|"]
    per_byte = [seconds / (2 * size) for seconds in everything[0].seconds]
    for contender in everything:
        low, middle, high = (1e6 * t for t in statistics.quantiles(contender.seconds, n=4))
        moved = contender.passes * size
        share = statistics.median(moved * least / took for least, took in zip(per_byte, contender.seconds, strict=True))
        lines.append(
            f"| {contender.op} | {contender.name} | {middle:.0f} ({low:.0f} to {high:.0f}) "
            f"| {1e-3 * moved / middle:.1f} | {100 * share:.0f} % |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    from benchmarks.norm_modules import _shape

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[(3200, 192), (16384, 768)])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled torch out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for rows, channels in options.shapes:
        for kind in options.dtype:
            dtype: torch.dtype = getattr(torch, kind)
            torch.compiler.reset()
            print(f"\n{rows} x {channels}, {kind}\n")
            print(table(measure(rows, channels, dtype, options), rows * channels * dtype.itemsize), flush=True)


if __name__ == "__main__":
    main()
