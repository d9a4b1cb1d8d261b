"""Measure the figures of the README on this machine: `python -m benchmarks`, or `make bench`.

It runs the benchmarks one after the other, prints their output, and writes it as one Markdown page. It uses a CUDA
device if there is one. On a CPU, modules and monitor are measured twice: with the defaults, which are the C++ kernels
where they have passed their self-test, and with ATen alone. `--only` and `--rounds` make it shorter.

Args: --quick: a run that only shows that everything works; --readme: only the tables that README.md and the docs show
of norm modules, monitor and switched steps, in less than ten minutes of two cores; --only SECTION ...; --rounds N,
--threads N, --device cpu|cuda, --output FILE. Default: runs/benchmarks.md.
"""

import argparse
import contextlib
import io
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import inference, kernels, memory, monitor_overhead, norm_modules, switched_step
from stabnorm.ops import admission, backends, tested, use_kernels
from stabnorm.ops.cpp import library

SECTIONS = ("kernels", "modules", "monitor", "switch", "memory", "inference")
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
QUICK: dict[str, list[str]] = {
    "kernels": ["--rounds", "2", "--shapes", "128x16", "--dtype", "float32", "--no-compile"],
    "modules": ["--rounds", "2", "--shapes", "128x16", "--dtype", "float32", "--no-compile"],
    "monitor": ["--rounds", "2", "--batch", "1"],
    "switch": ["--rounds", "2", "--models", "tiny", "--modes", "eager"],
    "memory": ["--shape", "128x16", "--batch", "1"],
    "inference": ["--rounds", "2", "--models", "vit-tiny", "--batch", "1", "--dtype", "float32", "--modes", "eager"],
}
README: dict[str, list[str]] = {  # fewer rounds than the benchmarks take by themselves
    "modules": ["--rounds", "12"],
    "monitor": ["--rounds", "5"],
    "switch": ["--rounds", "5"],
}


class _Both(io.TextIOBase):
    """Write to the screen and to the page."""

    def __init__(self, page: io.StringIO, screen: io.TextIOBase) -> None:
        self.page, self.screen = page, screen

    def write(self, text: str) -> int:
        self.screen.write(text)
        return self.page.write(text)

    def flush(self) -> None:
        self.screen.flush()


def machine(device: torch.device) -> str:
    """Describe the machine in general terms."""
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} {platform.machine()} cores"
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    allocation = "keeps freed memory" if set(ALLOCATION) <= set(os.environ) else "the system's default"
    return f"{gpu}{threads}, torch {torch.__version__}, allocation: {allocation}"


def settings(device: torch.device) -> Iterator[tuple[str, str]]:
    """Return the settings of `use_kernels` to measure with, and a title for each."""
    if device.type != "cpu":
        yield "auto", "as they come"
        return
    why_not = library.why_not()  # built now, not in the background while something is measured
    if why_not is None:
        admission.start(device)
        admission.wait(device)
        yield "cpp" if tested.entry_for(device) is None else "auto", "as they come"
        yield "aten", "without a compiler, STABNORM_KERNELS=aten"
    else:
        print(f"\nNot measured with the C++ backend: {why_not}")
        yield "aten", "as they come"


def run(options: argparse.Namespace) -> None:
    """Measure and print everything."""
    device = torch.device(options.device)
    common = ["--device", options.device]
    timed = ["--threads", str(options.threads), *common]
    if options.rounds is not None:
        timed += ["--rounds", str(options.rounds)]

    def section(name: str, title: str, main: Callable[[Sequence[str]], None], arguments: list[str]) -> None:
        print(f"\n## {title}\n", flush=True)
        main([*arguments, *(QUICK[name] if options.quick else README[name] if options.readme else [])])

    print(f"# Benchmarks\n\n{machine(device)}\n")
    for setting, title in settings(device):
        with use_kernels(setting):
            print(f"\nOps {title}:\n\n```\n{backends([device])}\n```")
    chosen = set(options.only)
    if "kernels" in chosen:
        section("kernels", "Kernels", kernels.main, timed)
    for setting, title in settings(device):
        with use_kernels(setting):
            if "modules" in chosen:
                section("modules", f"Norm modules, {title}", norm_modules.main, timed)
            if "monitor" in chosen:
                peers = ["--peers"] if title == "as they come" else []
                section("monitor", f"Monitor, {title}", monitor_overhead.main, [*timed, *peers])
            if "switch" in chosen and not (options.readme and title != "as they come"):
                section("switch", f"Training step while norms are switched, {title}", switched_step.main, timed)
    if "memory" in chosen:
        section("memory", "Memory", memory.main, common)
    if "inference" in chosen:
        section("inference", "Inference", inference.main, timed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    parser.add_argument("--readme", action="store_true", help="the tables of README.md and of the docs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs") / "benchmarks.md")
    options = parser.parse_args(arguments)
    options.only = options.only or list(README if options.readme else SECTIONS)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    page = io.StringIO()
    try:
        with contextlib.redirect_stdout(_Both(page, sys.stdout)):  # type: ignore[arg-type]
            run(options)
    finally:  # what was measured before an interruption is not lost
        options.output.write_text(page.getvalue(), encoding="utf-8")
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    if sys.platform == "linux" and not set(ALLOCATION) <= set(os.environ):
        # glibc reads these at the start only; without them it asks the system for every fresh output.
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], os.environ | ALLOCATION)
    main()
