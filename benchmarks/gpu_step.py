"""Measure the monitor's work at the end of a step, `step()`, on a GPU: `python -m benchmarks.gpu_step`.

The table has the time until `step()` returns, the time until the device is done, and the number of kernels and copies
that it launches, as the profiler counts them. The kernels stand beside the formulas, for the same layers.

Without a GPU nothing is timed: everything runs once, to test that it works.

Args: --rounds N, --layers COUNTxCHANNELS ...
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.gpu_kernels import shape
from stabnorm import StabilityMonitor
from stabnorm.ops import use_kernels

SIZES = [(25, 192), (25, 768), (100, 768), (25, 4096)]
SMALL_SIZES = [(2, 24)]  # without a GPU
WARM_UP = 3
TOKENS = 64  # the work of `step()` does not depend on them


class Steps:
    """Norms that were run forward and backward, and a monitor whose `step()` is measured.

    Args:
        layers: number of norms.
        channels: of each.
        setting: which kernels run.
        device: where.
    """

    def __init__(self, layers: int, channels: int, setting: str, device: torch.device) -> None:
        self.model = nn.Sequential(*(nn.LayerNorm(channels) for _ in range(layers))).to(device)
        self.x, self.setting, self.device = torch.randn(TOKENS, channels, device=device), setting, device
        with use_kernels(setting):
            self.monitor = StabilityMonitor(self.model, flush_every=1000)
            self.monitor.attach()

    def prepare(self) -> Tensor:
        """Run forward and backward, and return the loss."""
        with use_kernels(self.setting):
            loss: Tensor = self.model(self.x).square().mean()
            loss.backward()
        return loss

    def timed(self) -> tuple[float, float]:
        """Return the seconds until `step()` returns, and until the device is done."""
        loss = self.prepare()
        self._wait()
        start = time.perf_counter()
        with use_kernels(self.setting):
            self.monitor.step(loss=loss)
        returned = time.perf_counter()
        self._wait()
        return returned - start, time.perf_counter() - start

    def launches(self) -> int:
        """Return how many kernels and copies a step launches."""
        loss = self.prepare()
        self._wait()
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile,
            use_kernels(self.setting),
        ):
            self.monitor.step(loss=loss)
            self._wait()
        return sum(event.device_type.name == "CUDA" for event in profile.events() or ())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def table(sizes: Sequence[tuple[int, int]], rounds: int, device: torch.device) -> str:
    """Measure interleaved, and return the figures as Markdown."""
    gpu = device.type == "cuda"
    lines = [
        "| norms | | us until it returns (quartiles) | us until the device is done (quartiles) | launches |",
        "|---|---|---:|---:|---:|",
    ]
    for layers, channels in sizes:
        settings = {"kernels": "triton" if gpu else "auto", "formulas": "reference"}
        steps = {name: Steps(layers, channels, setting, device) for name, setting in settings.items()}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for number in range(WARM_UP + rounds if gpu else 2):
            for name, one in steps.items():
                measured = one.timed()
                if number >= WARM_UP or not gpu:
                    seconds[name].append(measured)
        for name, one in steps.items():
            figures = [_quartiles(column) if gpu else "not timed" for column in zip(*seconds[name], strict=True)]
            launches = str(one.launches()) if gpu else ""
            lines.append(f"| {layers} x {channels} | {name} | {' | '.join(figures)} | {launches} |")
            one.monitor.detach()
    return "\n".join(lines)


def _quartiles(seconds: Sequence[float]) -> str:
    low, middle, high = (1e6 * value for value in statistics.quantiles(seconds, n=4))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--layers", type=shape, nargs="+", default=SIZES if gpu else SMALL_SIZES)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    print(table(options.layers, options.rounds, torch.device("cuda" if gpu else "cpu")), flush=True)


if __name__ == "__main__":
    main()
