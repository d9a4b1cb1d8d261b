"""Measure the cost of a hook for small inputs: `python -m benchmarks.hooks`.

It measures milliseconds in hooks per training step, for nine LayerNorms with 16 x 64 inputs under a monitor. It also
measures microseconds of one call of an op on two rows, and of its formula. With --against, the same is measured for
another tree of this repository in a process of its own. Both take turns, so that other load on the machine affects both
alike. The ratio is the median over rounds, with its exact 95 % interval.

Args: --rounds N, --against FOLDER.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from scipy import stats
from torch import nn

STEPS, CALLS = 5, 500
FIGURES = {"hooks": "ms in hooks per step", "op": "us per op call", "formula": "us per formula"}


def rounds() -> Callable[[], dict[str, float]]:
    """Return a function that measures one round of all figures."""
    from stabnorm import StabilityMonitor
    from stabnorm.ops.rows import affine_of_rows

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(*(module for _ in range(9) for module in (nn.LayerNorm(64), nn.Linear(64, 64))))
    x, rows, vector = torch.randn(16, 64), torch.randn(2, 8), torch.randn(8)
    monitor = StabilityMonitor(net, flush_every=50)
    monitor.attach()

    def calls(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        return 1e6 * (time.perf_counter() - start) / CALLS

    def one() -> dict[str, float]:
        inside = 0.0
        for _ in range(STEPS):
            before = monitor.seconds
            net(x).sum().backward()
            inside += monitor.seconds - before
            monitor.step()
        op = calls(lambda: affine_of_rows(rows, vector, vector))
        formula = calls(lambda: torch.addcmul(vector, rows, vector).to(rows.dtype))
        return {"hooks": 1e3 * inside / STEPS, "op": op, "formula": formula}

    return one


def serve() -> None:
    """Measure one round for each input line."""
    one = rounds()
    for _ in sys.stdin:
        print(json.dumps(one()), flush=True)


def measure(trees: Sequence[Path], count: int) -> list[list[dict[str, float]]]:
    """Return the rounds of every tree."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for tree in trees
    ]
    results: list[list[dict[str, float]]] = [[] for _ in trees]
    for number in range(count + 3):
        for worker, of_tree in zip(workers, results, strict=True):
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if number >= 3:  # the first are warm-up
                of_tree.append(json.loads(line))
    for worker in workers:
        worker.communicate()
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return
    trees = [Path(__file__).parents[1], *([] if options.against is None else [options.against.resolve()])]
    results = measure(trees, options.rounds)
    print("| | figure | fastest | median | ratio of rounds |\n|---|---|---:|---:|---:|")
    for figure, title in FIGURES.items():
        for name, of_tree in zip(("here", "against"), results, strict=False):
            values = [one[figure] for one in of_tree]
            ratios = [one[figure] / here[figure] for one, here in zip(of_tree, results[0], strict=True)]
            interval = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)  # exact, for any distribution
            ratio = f"{statistics.median(ratios):.2f} ({interval.low:.2f} to {interval.high:.2f})"
            print(f"| {name} | {title} | {min(values):.2f} | {statistics.median(values):.2f} | {ratio} |")


if __name__ == "__main__":
    main()
