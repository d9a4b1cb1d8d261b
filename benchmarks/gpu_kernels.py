"""Compare the kernels with their byte floor, torch, Liger-Kernel and apex: `python -m benchmarks.gpu_kernels`.

On a GPU, calls are captured in a CUDA graph over inputs that together are several times as large as the cache. The
graph is replayed, so the time is that of the device, not of Python. In each round every contender runs once, in a
random order. The byte floor of an op is the memory traffic that it needs: each input is read once, each output is
written once, and an input is read twice if a statistic of it must be known first. The table has the time, the share of
this machine's copy bandwidth (floor bytes over time), and the ratio to torch's LayerNorm for the same task.

Without a GPU nothing is timed: every contender runs once, to test that it works.

Args: --shapes ROWSxCHANNELS ..., --dtype float32 bfloat16 float16, --rounds N, --device.
"""

import argparse
import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.rounds import in_turn
from stabnorm import functional
from stabnorm.functional import RawMoments
from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm
from stabnorm.ops import use_kernels
from stabnorm.ops.accumulators import empty_accumulators
from stabnorm.ops.moments import accumulate_moments_
from stabnorm.ops.observed import Spec, backend_for, observed_norm, splits_for
from stabnorm.ops.rows import moments_of_rows

CACHE = 256 << 20  # bytes of inputs taken in turn: several times the largest L2
WARM_UP = 3
SIZES = [(16384, 768), (50432, 384), (8192, 192), (65536, 1024)]
SMALL_SIZES = [(65, 48)]  # without a GPU
Call = Callable[[Tensor, Tensor], object]  # of input and upstream gradient


@dataclass
class Contender:
    """One way to compute an op, and its times."""

    op: str
    name: str
    floor: int  # reads and writes of a whole tensor
    call: Call
    seconds: list[float] = field(default_factory=list)
    trouble: str = ""


def _trained(module: nn.Module, setting: str, device: torch.device, dtype: torch.dtype) -> Call:
    module.to(device, dtype)
    parameters = list(module.parameters())

    def both_ways(x: Tensor, dy: Tensor) -> object:
        with use_kernels(setting):
            return torch.autograd.grad(module(x), [x, *parameters], dy)

    return both_ways


def _forward(module: nn.Module) -> Call:
    return lambda x, dy: module(x.detach())


def _compiled(module: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(module, dynamic=False))


def _others(channels: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
    """Return the LayerNorms of other packages that are installed."""
    for package, path, name in (
        ("liger_kernel", "liger_kernel.transformers.layer_norm", "LigerLayerNorm"),
        ("apex", "apex.normalization", "FusedLayerNorm"),
    ):
        if importlib.util.find_spec(package) is not None:
            yield package, getattr(importlib.import_module(path), name)(channels).to(device, dtype)


class ObservedNorm(nn.LayerNorm):
    """A LayerNorm that also adds the moments of its input to an accumulator, in the same pass."""

    def __init__(self, channels: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(channels, device=device, dtype=dtype)
        self.spec = Spec("layer", (channels,), self.eps, True, True)
        with use_kernels("triton"):
            accumulators = empty_accumulators(1, channels, device, splits_for(channels, device))
        self.accumulator = RawMoments(*(part[0] for part in accumulators))

    def forward(self, x: Tensor) -> Tensor:
        """Return the LayerNorm of x."""
        with use_kernels("triton"):
            backend = backend_for(x, self.weight, self.bias, self.spec, self.accumulator)
            assert backend is not None
            return observed_norm(x, self.weight, self.bias, self.spec, None, self.accumulator, backend)


def contenders(channels: int, device: torch.device, dtype: torch.dtype) -> Iterator[Contender]:
    """Return every op with each way to compute it."""
    compiled = device.type == "cuda"
    accumulators = {}
    for setting in ("triton", "reference"):
        with use_kernels(setting):
            accumulators[setting] = [part[0] for part in empty_accumulators(1, channels, device)]

    def observe(setting: str, whole: bool) -> Call:
        seen, channel, token = accumulators[setting]

        def call(x: Tensor, dy: Tensor) -> object:
            with use_kernels(setting):
                accumulate_moments_(x.detach(), None, seen, channel, token, "layer", -1, tokens=whole, normalized=whole)
            return None

        return call

    yield Contender("moments of a channel, for the monitor", "kernel", 1, observe("triton", False))
    yield Contender("all moments, for the monitor", "kernel", 1, observe("triton", True))
    yield Contender("all moments, for the monitor", "torch", 1, observe("reference", True))

    def batch(setting: str) -> Call:
        def call(x: Tensor, dy: Tensor) -> object:
            with use_kernels(setting):
                return moments_of_rows(x.detach(), None, center=True)

        return call

    yield Contender("moments of a batch", "kernel", 1, batch("triton"))
    yield Contender("moments of a batch", "torch", 1, batch("reference"))
    if compiled:
        formula = torch.compile(lambda x: functional.batch_moments(x.float(), None, center=True))
        yield Contender("moments of a batch", "torch, compiled", 1, lambda x, dy: formula(x.detach()))
        yield Contender("moments of a batch", "batch_norm_stats", 1, lambda x, dy: torch.batch_norm_stats(x, 1e-5))

    layer_norm = nn.LayerNorm(channels, device=device, dtype=dtype)
    norms: list[tuple[str, nn.Module]] = [("torch", layer_norm), *_others(channels, device, dtype)]
    if compiled:
        norms.append(("torch, compiled", _compiled(layer_norm)))
    for name, norm in norms:
        yield Contender("LayerNorm", name, 5, _trained(norm, "reference", device, dtype))

    for name, norm in (("torch", layer_norm), ("kernels, with all moments", ObservedNorm(channels, device, dtype))):
        if name == "torch" or device.type == "cuda":
            yield Contender("LayerNorm, forward", name, 2, _forward(norm))
    if device.type == "cuda":
        observed = ObservedNorm(channels, device, dtype)
        yield Contender("LayerNorm", "kernels, with all moments", 5, _trained(observed, "triton", device, dtype))

    def half_way() -> nn.Module:
        norm = PRepBN(channels)
        norm.lam.fill_(0.5)
        return norm

    for op, make, floor in (
        ("RepBN", lambda: RepBN(channels), 8),
        ("UnifiedNorm", lambda: UnifiedNorm(channels, warmup_steps=0), 8),
        ("PowerNorm", lambda: PowerNorm(channels, warmup_steps=0), 5),
        ("PRepBN", half_way, 8),
    ):
        for name, setting in (("kernels", "triton"), ("torch", "reference")):
            yield Contender(op, name, floor, _trained(make(), setting, device, dtype))
        if compiled:
            yield Contender(op, "torch, compiled", floor, _trained(_compiled(make()), "reference", device, dtype))


def _captured(call: Call, inputs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Capture one call for each input as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call(*inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for pair in inputs:
            call(*pair)
    return graph.replay


def _timed(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes read and written per second in a copy of a gigabyte."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    times = [_timed(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * source.numel() * 4 / statistics.median(times[3:])


def measure(rows: int, channels: int, dtype: torch.dtype, device: torch.device, rounds: int) -> list[Contender]:
    """Run the rounds; without a GPU, run everything once."""
    torch.manual_seed(0)
    contestants = list(contenders(channels, device, dtype))
    bytes_of_one = rows * channels * dtype.itemsize
    sets = 1 if device.type != "cuda" else max(2, min(64, -(-CACHE // (2 * bytes_of_one))))
    inputs = [
        (
            torch.randn(rows, channels, device=device).to(dtype).requires_grad_(),
            torch.randn(rows, channels, device=device).to(dtype),
        )
        for _ in range(sets)
    ]
    if device.type != "cuda":
        for contender in contestants:
            contender.call(*inputs[0])
        return contestants
    ready: list[tuple[Contender, Callable[[], None]]] = []
    for contender in contestants:
        try:
            ready.append((contender, _captured(contender.call, inputs)))
        except Exception as error:  # an error in another library is shown in the table, and the others go on
            contender.trouble = f"{type(error).__name__}: {error}".splitlines()[0][:60]
            torch.cuda.synchronize()
    for number in range(WARM_UP + rounds):
        for contender, run in in_turn(ready, number):
            took = _timed(run) / sets
            if number >= WARM_UP:
                contender.seconds.append(took)
    return contestants


def table(contestants: Sequence[Contender], size: int, bandwidth: float | None) -> str:
    """Return the figures as Markdown; `size` is that of one tensor in bytes."""
    norms = {c.op: c.seconds for c in contestants if c.op.startswith("LayerNorm") and c.name == "torch"}
    lines = [
        "| op | who | us (interquartile range) | % of copy bandwidth by the floor | x torch's LayerNorm |",
        "|---|---|---:|---:|---:|",
    ]
    for who in contestants:
        if not who.seconds:
            lines.append(f"| {who.op} | {who.name} | {who.trouble or 'not timed'} | | |")
            continue
        low, middle, high = statistics.quantiles(who.seconds, n=4)
        share = "" if bandwidth is None else f"{100 * who.floor * size / middle / bandwidth:.0f}"
        norm = norms.get(who.op, norms["LayerNorm"])  # forward, or there and back
        ratio = f"{middle / statistics.median(norm):.2f}" if who.floor > 1 and norm else ""
        lines.append(
            f"| {who.op} | {who.name} | {1e6 * middle:.1f} ({1e6 * low:.1f} to {1e6 * high:.1f}) | {share} | {ratio} |"
        )
    return "\n".join(lines)


def shape(text: str) -> tuple[int, int]:
    """Parse ROWSxCHANNELS."""
    rows, _, channels = text.partition("x")
    if not (rows.isdigit() and channels.isdigit() and int(rows) and int(channels)):
        raise argparse.ArgumentTypeError(f"{text!r} is no ROWSxCHANNELS such as 16384x768")
    return int(rows), int(channels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--shapes", type=shape, nargs="+", default=SIZES if gpu else SMALL_SIZES)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    bandwidth = copy_bandwidth(device) if device.type == "cuda" else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: nothing is timed"
    print(f"{name}, torch {torch.__version__}" + (f", copy {bandwidth / 1e12:.2f} TB/s" if bandwidth else ""))
    for rows, channels in options.shapes:
        for kind in options.dtype:
            dtype = getattr(torch, kind)
            torch.compiler.reset()
            measured = measure(rows, channels, dtype, device, options.rounds)
            size = rows * channels * dtype.itemsize
            print(
                f"\n**{rows} x {channels}, {kind}** ({size / 1e6:.1f} MB)\n\n{table(measured, size, bandwidth)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
