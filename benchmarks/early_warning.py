"""Measure how early faults of a training are warned of, and false alarms: `python -m benchmarks.early_warning`.

Small trainings (`benchmarks.faulty_trainings`) are broken on purpose, each from the same step on: 600 healthy steps are
trained once for each family and seed, and every fault continues from there. Beside them stand calm trainings with
warm-up, decay, restarts and dropout. All are watched by `StabilityMonitor` with the companions "attention" and
"weights"; beside it, in the same runs, by the rules of `benchmarks.peer_rules` on loss and gradient norm.

A training visibly diverges where the median of the next five losses is above the calm range (one and a half times the
distance of the largest median of the last 96 calm steps from their middle, and a tenth of the middle), where one loss
is above twice the middle, or where it is not finite. This looks ahead, so every rule that could be used is later. A
warning comes before it if its step is smaller. Calm steps count from step 256 on, because before it there is no past to
compare with. Of every rule, calm alarms within 100 steps of each other are one false alarm; the last column has the
share of calm steps with an alarm, because a rule that alarms all the time finds every fault. What is there at once is
found at once or too late: its table says in how many runs the step was refused before the optimizer applied it
(`StabilityMonitor.verdict_before_step`), and in how many an alarm named the same step.

Constants of the detector are to be chosen on the seeds 0 to 3, and figures are to be quoted of the seeds from 10 on.
Some of the present constants were chosen on seeds 10 and 11, and one on deep models of seed 12. So no constant has seen
the models of four blocks of seeds 12 and 13.
Every run is a file in the folder, and existing runs are not repeated, so that an interrupted study goes on. One run of
a fault takes some ten seconds on a core of its own, and a calm one about a minute.

Spikes that arise by themselves are the kind "slingshots", see `benchmarks.slingshot`.

Args: --kinds NAME ..., --families NAME ..., --seeds N ..., --folder PATH, --depth N, --width N, --batch N,
--dtype NAME, --quick, --table.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from benchmarks import slingshot
from benchmarks.broken_runs import QUICK, Length, Outcome, Progress, Study
from benchmarks.faulty_trainings import CALM, FAMILIES, FAULTS, Dtype
from benchmarks.judged_runs import HOT, judge, tables

SLINGSHOTS = "slingshots"
KINDS = (*FAULTS, HOT, *(f"calm: {name}" for name in CALM), SLINGSHOTS)


def bar(name: str) -> Progress:
    """Return a function that shows how far a run is."""
    last = [0.0]

    def show(done: int, total: int) -> None:
        if done < total and time.perf_counter() - last[0] < 1:
            return
        last[0] = time.perf_counter()
        full = 30 * done // total
        end = "\n" if done == total else ""
        print(f"\r{name} [{'#' * full}{'-' * (30 - full)}] {done}/{total}", end=end, file=sys.stderr, flush=True)

    return show


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.early_warning", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME", help=", ".join(KINDS))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12, 13])
    parser.add_argument("--folder", type=Path, default=Path("runs") / "early_warning")
    parser.add_argument("--depth", type=int, default=4, help="blocks of a model. Default: 4")
    parser.add_argument("--width", type=int, default=0, help="of a model. Default: that of its family")
    parser.add_argument("--batch", type=int, default=0, help="images or texts of a step. Default: that of the family")
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="float32",
        help='"autocast": forwards in bfloat16; "bfloat16": weights and moments in it, too. Default: float32',
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few steps of each run, to see that all of it works")
    parser.add_argument("--table", action="store_true", help="only print the tables of the runs that exist")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    study = Study(options.folder, QUICK if options.quick else Length())
    wanted = [
        Outcome(kind, family, seed, options.depth, options.width, options.batch, options.dtype)
        for seed in options.seeds for family in options.families for kind in options.kinds if kind != SLINGSHOTS
    ]  # fmt: skip
    runs = [study.read(o) if options.table else study.run(o, bar(f"{o.kind}, {o.family}, {o.seed}")) for o in wanted]
    for table in tables([judge(run) for run in runs if run is not None]):
        print(table, end="\n\n")
    if SLINGSHOTS in options.kinds:
        seeds = [str(seed) for seed in options.seeds]
        steps = ["--steps", "4"] if options.quick else []
        only = ["--table"] if options.table else []
        slingshot.main(["--seeds", *seeds, "--out", str(options.folder / "slingshots.jsonl"), *steps, *only])


if __name__ == "__main__":
    main()
