"""Measure how the monitor's cost grows: `python -m benchmarks.monitor_scale`.

It prints the monitor's own time per step (hooks, `step()` and flush) early and late in a long run and by the number of
layers, its memory by depth and width, and what one very wide layer among narrow ones costs. Time is the processor's, so
that other load on the machine counts little. Other trees of this repository print the same for comparison: run the file
there.

Args: --steps N, --layers N: the longest run and the deepest model.
"""

import argparse
import io
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from benchmarks.memory import live_bytes
from stabnorm import StabilityMonitor
from stabnorm.ops import admission
from stabnorm.ops.dispatch import kernels

MIB = 2**20
MOST_TOKENS = 8


class Norms(nn.Module):
    """Norms of these shapes, each with an input of its own."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(shape) for shape in shapes)
        self.inputs = [torch.randn(MOST_TOKENS, *shape) for shape in shapes]

    def forward(self) -> torch.Tensor:
        """Return the sum of squares of all outputs."""
        return torch.stack([norm(x).square().sum() for norm, x in zip(self.norms, self.inputs, strict=True)]).sum()


def step(net: Norms, monitor: StabilityMonitor) -> float:
    """Take a step, and return the milliseconds of processor time in `step()` and flush."""
    net().backward()
    start = time.process_time()
    monitor.step(loss=1.0)
    return 1e3 * (time.process_time() - start)


def long_run(most: int) -> Iterator[str]:
    """Yield a table of the cost per step around the steps 100, 1 000, ..."""
    net = Norms([(64,)] * 4)
    ends = [10**power for power in range(2, len(str(most)))]
    yield from ("| step | `step()` and flush, ms | history, MiB |", "|---:|---:|---:|")
    with StabilityMonitor(net) as monitor:
        spent: list[float] = []
        for number in range(1, most + 1):
            spent.append(step(net, monitor))
            net.zero_grad()
            if number in ends:
                size = sum(values.nbytes for values in monitor.history().values()) / MIB
                yield f"| {number} | {sum(spent[-100:]) / 100:.3f} | {size:.1f} |"
                spent.clear()


def depths(most: int) -> Iterator[str]:
    """Yield a table of the cost per step by the number of layers of width 64."""
    yield from ("| layers | `step()` and flush, ms | per layer, us |", "|---:|---:|---:|")
    for layers in (count for count in (1, 10, 100, 1000) if count <= most):
        net = Norms([(64,)] * layers)
        with StabilityMonitor(net, flush_every=10) as monitor:
            for _ in range(10):
                step(net, monitor)
            mean = sum(step(net, monitor) for _ in range(20)) / 20
        yield f"| {layers} | {mean:.2f} | {1e3 * mean / layers:.1f} |"


def memory() -> Iterator[str]:
    """Yield a table of the bytes that a monitor holds after ten steps, by depth, width and shape."""
    yield from ("| layers | holds, MiB | checkpoint, MiB | `step()` and flush, ms |", "|---|---:|---:|---:|")
    narrow: list[tuple[int, ...]] = [(64,)] * 40
    cases: dict[str, list[tuple[int, ...]]] = {
        "40 x 64": narrow,
        "40 x 64 and one of 16 x 64 x 64": [*narrow, (16, 64, 64)],
        "100 x 768": [(768,)] * 100,
        "100 x 4096": [(4096,)] * 100,
    }
    for name, shapes in cases.items():
        yield f"| {name} | {_held(shapes)} |"


def _held(shapes: Sequence[tuple[int, ...]]) -> str:
    net = Norms(shapes)
    net().backward()
    before = live_bytes()
    with StabilityMonitor(net, flush_every=10) as monitor:
        spent = [step(net, monitor) for _ in range(10)]
        held = live_bytes() - before
        torch.save(monitor.state_dict(), file := io.BytesIO())
    return f"{held / MIB:.1f} | {len(file.getvalue()) / MIB:.1f} | {sum(spent[1:]) / 9:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=1000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if kernels() == "auto":
        admission.start(torch.device("cpu"))
        admission.wait(torch.device("cpu"))
    for table in (memory(), depths(options.layers), long_run(options.steps)):
        print()
        for line in table:
            print(line, flush=True)


if __name__ == "__main__":
    main()
