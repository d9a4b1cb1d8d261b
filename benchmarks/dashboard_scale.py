"""What a long record costs the dashboard: disk, reading, the first picture, zooming, memory.

    python -m benchmarks.dashboard_scale
    python -m benchmarks.dashboard_scale --layers 49 --statistics 24 --steps 10000
    python -m benchmarks.dashboard_scale --whole

Writes a record block by block, as a training does, and measures in a process of its own what the page's server does
with it. The old steps are thinned to the default bound; with --whole the record is an event file of TensorBoard's,
which has every step and takes 1.2 GB of a temporary folder. Values are noise, as a real run's are.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from stabnorm.dashboard.answers import Answers
from stabnorm.monitor.record import Block, FileRecord, TensorBoardRecord

BLOCK = 50  # steps of a flush


def write(folder: Path, layers: int, statistics: int, steps: int, *, whole: bool) -> None:
    """Write the record."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder)) if whole else None
    record = FileRecord(folder) if writer is None else TensorBoardRecord(writer)
    random = np.random.default_rng(0)
    names = tuple(f"blocks.{i}.norm" for i in range(layers))
    series = ["token_std_mean", "amax", *(f"own_{i}" for i in range(statistics - 2))]
    noise = np.exp(0.05 * random.standard_normal((4096, layers))).astype(np.float32)
    for first in range(0, steps, BLOCK):
        part = {name: noise[random.integers(4096, size=BLOCK)] for name in series}
        part["loss"] = random.random(BLOCK, np.float32)
        record.write_block(Block(first, names, part))
    record.close()
    if writer is not None:
        writer.close()


def measure(folder: Path) -> dict[str, float]:
    """Return seconds and bytes of what the page's server does first."""
    took: dict[str, float] = {}
    begin = time.perf_counter()
    answers = Answers({"": folder})
    answers.refresh()
    took["read the file"] = time.perf_counter() - begin
    (run,) = answers.runs()
    last = int(run.rows().steps[-1])
    questions: dict[str, Callable[[], object]] = {
        "first picture": lambda: (answers.overview(), answers.map(run.name, "token_std_mean", columns=900)),
        "the same again": lambda: answers.map(run.name, "token_std_mean", columns=900),
        "zoom to a tenth": lambda: answers.map(
            run.name, "token_std_mean", first=last // 2, last=last // 2 + last // 10, columns=900
        ),
        "another statistic": lambda: answers.map(run.name, "amax", columns=900),
    }
    for name, ask in questions.items():
        begin = time.perf_counter()
        ask()
        took[name] = time.perf_counter() - begin
    took["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return took


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--statistics", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--whole", action="store_true", help="an event file, which has every step")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # in the process that measures
    options = parser.parse_args(arguments)
    if options.folder:
        print(json.dumps(measure(Path(options.folder))))
        return {}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        write(Path(folder), options.layers, options.statistics, options.steps, whole=options.whole)
        wrote = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        command = [sys.executable, "-m", "benchmarks.dashboard_scale", "--folder", folder]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    took: dict[str, float] = json.loads(printed)
    took["bytes per step"] = size / options.steps
    size_in_words = f"{options.layers} layers x {options.statistics} statistics x {options.steps:,} steps"
    print(f"{size_in_words}, written in {wrote:.1f} s")
    print(f"{'on disk':20} {size / 1e6:10.1f} MB, {took['bytes per step']:,.0f} bytes per step")
    for name, seconds in took.items():
        if name not in ("memory", "bytes per step"):
            print(f"{name:20} {seconds:10.2f} s")
    print(f"{'memory of the server':20} {took['memory'] / 1e6:10.0f} MB")
    return took


if __name__ == "__main__":
    main()
