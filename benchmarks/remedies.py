"""Show whether each remedy cures what it is for: `python -m benchmarks.remedies`.

Each case of `benchmarks.remedy_cases` provokes a symptom in a small model, the same seed once without and once with
each remedy. Most values in the table are those of a statistic of the monitor: its worst row, averaged over the last
tenth of the steps, or at the worst step. A remedy *cures* when the value is back within its bound; where there is no
bound, when it has halved. It *helps* when the value is at most 0.8 of what it was. The loss is that on test data after
the last step. It is "no worse" when the mean over the seeds is at most 0.02 nats above that without the remedy.

Every run is a line of `runs/remedies.jsonl`; existing runs are not repeated. All of them take about fifteen minutes on
one core.

Args: --seeds N ..., --steps N, --cases NAME ..., --out FILE, --table, --quick.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.remedy_cases import CASES, NONE, Case
from stabnorm import StabilityMonitor, find_norms
from stabnorm.dashboard.definitions import definition

SEEDS = (0, 1, 2)
WORSE = 0.02  # nats


@dataclass
class Outcome:
    """The line of one run."""

    case: str
    remedy: str
    seed: int
    steps: int
    value: float = math.nan
    loss: float = math.nan
    named: bool = False  # whether what the monitor says of this statistic names a remedy of the table
    seconds: float = 0.0  # of the processor

    @property
    def key(self) -> tuple[str, str, int, int]:
        """The values that identify this run."""
        return self.case, self.remedy, self.seed, self.steps


def run(outcome: Outcome) -> Outcome:
    """Train once, and fill in the outcome."""
    case = CASES[outcome.case]
    torch.manual_seed(outcome.seed)
    training = case.build()
    if outcome.remedy != NONE:
        case.remedies[outcome.remedy](training)
    model = training.model
    optimizer = training.optimizer([p for p in model.parameters() if p.requires_grad])
    for begin in training.begun:
        begin(optimizer)
    start = time.process_time()
    watching = StabilityMonitor(model, training.watched, companions=training.companions) if find_norms(model) else None
    with watching or contextlib.nullcontext() as monitor:
        for _ in range(outcome.steps):
            loss = training.loss(next(training.batches))
            optimizer.zero_grad()
            loss.backward()
            for call in training.before_update:
                call(monitor)
            optimizer.step()
            if monitor is not None:
                monitor.step(loss=loss)
            for call in training.after_update:
                call(monitor)
    model.eval()
    for end in training.at_end:
        end()
    with torch.no_grad():
        outcome.loss = float(training.loss(training.test))
    outcome.value = case.value(training, monitor)
    outcome.named = bool(case.symptom) and "stabnorm." in definition(case.symptom).advice
    outcome.seconds = round(time.process_time() - start, 1)
    return outcome


# --- the table ---


def verdict(case: Case, value: float, loss: float, without: tuple[float, float]) -> str:
    """Say whether the value is back within its bound, and what the loss says."""
    change = loss - without[1]
    if not math.isfinite(loss):
        judged = "loss not finite"
    else:
        judged = f"loss {'better' if change < -WORSE else 'no worse' if change <= WORSE else 'worse'}"
    if math.isnan(without[0]):
        return judged
    if math.isnan(value):
        return f"nothing left to measure, {judged}"
    goal = case.bound if case.bound is not None else without[0] / 2
    cured = "cured" if value <= goal else "did not help" if value > 0.8 * without[0] else "helped"
    return f"{cured}, {judged}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the table of all cases, as Markdown: means over the seeds, and the largest distance from them."""
    lines = ["| case | value, bound | remedy | value | loss, nats | verdict |", "|---|---|---|---:|---:|---|"]
    for name, case in CASES.items():
        runs = {arm: [o for o in outcomes if (o.case, o.remedy) == (name, arm)] for arm in (NONE, *case.remedies)}
        if not runs[NONE]:
            continue
        without = fmean(o.value for o in runs[NONE]), fmean(o.loss for o in runs[NONE])
        for arm, some in runs.items():
            if some:
                values, losses = [o.value for o in some], [o.loss for o in some]
                said = "-" if arm == NONE else verdict(case, fmean(values), fmean(losses), without)
                bound = "" if case.bound is None else f", {case.bound:g}"
                lines.append(
                    f"| {name} | {case.measured}{bound} | {arm if arm == NONE else f'`{arm}`'} | {_spread(values)} "
                    f"| {_spread(losses)} | {said} |"
                )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    middle = fmean(values)
    return f"{middle:.3g} ± {max(abs(value - middle) for value in values):.2g}" if math.isfinite(middle) else "-"


def read(path: Path) -> list[Outcome]:
    """Return the runs that there are."""
    if not path.exists():
        return []
    return [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, help="default: those of each case")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path, default=Path("runs/remedies.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table of the runs that there are")
    parser.add_argument("--quick", action="store_true", help="one seed and two steps, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps = options.seeds[:1], 2
    done = {outcome.key: outcome for outcome in read(options.out)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    wanted = [
        Outcome(name, arm, seed, options.steps or CASES[name].steps)
        for name in options.cases
        for seed in options.seeds
        for arm in (NONE, *CASES[name].remedies)
    ]
    for outcome in [] if options.table else wanted:
        if outcome.key in done:
            continue
        done[outcome.key] = run(outcome)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(
            f"{outcome.case}, {outcome.remedy}, seed {outcome.seed}: {outcome.value:.4g}, loss {outcome.loss:.4f}, "
            f"{outcome.seconds} s",
            file=sys.stderr,
        )
    print(table([done[outcome.key] for outcome in wanted if outcome.key in done]))


if __name__ == "__main__":
    main()
