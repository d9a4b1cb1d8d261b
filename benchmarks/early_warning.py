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
share of calm steps with an alarm, because a rule that alarms all the time finds every fault.

Constants of the detector are to be chosen on the seeds 0 to 3, and figures are to be quoted of the seeds from 10 on.
Some of the present constants were chosen on seeds 10 and 11, so 12 and 13 are the ones that no constant has seen.
Every run is a file in the folder, and existing runs are not repeated, so that an interrupted study goes on. One run of
a fault takes some ten seconds on a core of its own, and a calm one about a minute.

Spikes that arise by themselves are the kind "slingshots", see `benchmarks.slingshot`.

Args: --kinds NAME ..., --families NAME ..., --seeds N ..., --folder PATH, --depth N, --width N, --batch N,
--dtype NAME, --quick, --table.
"""

import argparse
import copy
import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from benchmarks import slingshot
from benchmarks.faulty_trainings import CALM, FAMILIES, FAULTS, Dtype, Fault, Training, constant, warmed_up
from benchmarks.peer_rules import GRADIENT_RULES, LOSS_RULES, Series, events
from stabnorm import Alert, StabilityMonitor
from stabnorm.companions import AttentionCompanion, WeightCompanion
from stabnorm.monitor.alerts import Departure
from stabnorm.monitor.detect import RobustDetector
from stabnorm.monitor.onsets import Onset, OnsetFollower, Watched
from stabnorm.monitor.record import Block
from stabnorm.monitor.statistics import resolve
from stabnorm.monitor.training_series import TrainingSeries
from stabnorm.statistic import Statistic, markdown_table

OURS, LOSS = "stabnorm", "loss, by our rule"
STATISTICS: dict[str, tuple[Statistic, ...]] = {
    "": resolve("standard"), "attention": AttentionCompanion.statistics, "weights": WeightCompanion.statistics,
}  # fmt: skip
AMAX = [statistic.name for statistic in STATISTICS[""]].index("amax")
ARMED, FLUSH = 256, 50
HOT = "learning rate x30 from the start"
SLINGSHOTS = "slingshots"
KINDS = (*FAULTS, HOT, *(f"calm: {name}" for name in CALM), SLINGSHOTS)


@dataclass(frozen=True)
class Length:
    """Numbers of steps: before a fault, of a fault that grows, of one that is there at once, and of a calm training."""

    before: int = 600
    gradual: int = 400
    instant: int = 120
    calm: int = 2800


QUICK = Length(8, 4, 4, 8)


@dataclass
class Outcome:
    """One run: what was trained, and every number that a rule may read.

    Attributes:
        kind, family, seed: what was trained.
        depth, width, batch: of the model, in blocks, and of its batches; 0: those of the family.
        dtype: "float32"; "autocast": forwards in bfloat16; "bfloat16": weights and moments in it, too.
        begin: the step at which the fault begins; the number of steps in a calm run.
        losses, gradients, rates: ``[steps]``, loss, norm of the gradient and learning rate from the first step on.
        rows: of the norms (""), and of each companion, the names of the rows.
        values: the same, ``[steps, rows, statistics]``.
        tokens: ``[steps, norms]``.
        expected: the layers that may rightly be named; empty for a global fault.
        seconds: what the run took.
    """

    kind: str
    family: str
    seed: int
    depth: int = 4
    width: int = 0
    batch: int = 0
    dtype: Dtype = "float32"
    begin: int = 0
    losses: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    expected: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The name of its file."""
        words = f"{self.kind} {self.family} {self.seed} depth{self.depth}"
        words += f" width{self.width}" * bool(self.width) + f" batch{self.batch}" * bool(self.batch)
        words += f" {self.dtype}" * (self.dtype != "float32")
        return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in words)

    @property
    def is_calm(self) -> bool:
        """Whether every alarm is a false one."""
        return self.kind.startswith("calm") or self.kind == "nothing"

    @property
    def calm_from(self) -> int:
        """The first step of a calm run that counts; the healthy steps before a fault are the same in all runs."""
        return max(ARMED, self.begin if self.kind == "nothing" else 0)


@dataclass(frozen=True)
class Judged:
    """A run and what the rules said of it.

    Attributes:
        run: the run.
        visible: the step at which the training visibly diverges; None if it does not.
        alarms: of each rule the steps of its alarms.
        onsets: what ours says of them.
    """

    run: Outcome
    visible: int | None
    alarms: dict[str, list[int]]
    onsets: list[Onset]

    def first(self, rule: str) -> int | None:
        """Return the step of the first alarm since the fault."""
        return next((step for step in self.alarms[rule] if step >= self.run.begin), None)

    def lead(self, rule: str) -> int | None:
        """Return by how many steps the first alarm precedes the visible divergence; None if one is missing."""
        first = self.first(rule)
        return None if first is None or self.visible is None else self.visible - first

    @property
    def onset(self) -> Onset | None:
        """What was said first since the fault."""
        return next((onset for onset in self.onsets if onset.last_step >= self.run.begin), None)

    @property
    def names_right(self) -> bool | None:
        """Whether the layer that was named is a guilty one; None if the fault has no place or no alarm came."""
        if not self.run.expected or self.onset is None:
            return None
        layer = self.onset.layer
        return any(layer == name or layer.startswith(name + ".") for name in self.run.expected)

    @property
    def scope_right(self) -> bool | None:
        """Whether it was told whether one place or everything is broken; None if no alarm came.

        Nearly all layers see a broken input, so that either answer is right there. A value that is not finite has its
        own answer.
        """
        if self.onset is None or self.run.kind not in FAULTS or FAULTS[self.run.kind].where == "input":
            return None
        local = self.onset.scope in ("one layer", "from here on")
        return local == (FAULTS[self.run.kind].where == "block")


def judge(run: Outcome) -> Judged:
    """Let every rule read a run from its first step on; ours as the monitor does, flush by flush."""
    detectors = {name: RobustDetector(STATISTICS[name], rows) for name, rows in run.rows.items()}
    training, follower, alerts = TrainingSeries(), OnsetFollower(), list[Alert]()
    beside = {name: len(rows) for name, rows in run.rows.items() if name}
    losses, gradients, rates = np.array(run.losses), np.array(run.gradients), np.array(run.rates)
    for first in range(0, len(losses), FLUSH):
        part = slice(first, first + FLUSH)
        raised, departed = list[Alert](), list[Departure]()
        for name, detector in detectors.items():
            values = run.values[name][part]
            tokens = torch.full(values.shape[:2], torch.inf) if name else run.tokens[part]
            nonfinite = torch.zeros(values.shape[:2], dtype=torch.bool)
            if not name:
                nonfinite = ~torch.isfinite(values[..., AMAX]) & (tokens > 0)
            found = detector.update(first, values, tokens, nonfinite)
            raised += [dataclasses.replace(alert, companion=name) for alert in found]
            departed += [departure._replace(companion=name) for departure in detector.take_departures()]
        series = {"loss": losses[part], "gradient_norm": gradients[part]}
        raised += training.update(first, series, ~np.isfinite(losses[part]))
        departed += training.take_departures()
        follower.settings.see(Block(first, run.rows[""], {"learning_rate": rates[part]}))
        watched = Watched(run.rows[""], beside, min(first + FLUSH, len(losses)))
        follower.add(raised, departed, watched)
        alerts += raised
    alarms = {OURS: sorted(alert.step for alert in alerts)}
    alarms |= {name: list(rule(losses)) for name, rule in LOSS_RULES.items()}
    alarms |= {name: list(rule(gradients)) for name, rule in GRADIENT_RULES.items()}
    return Judged(run, visible_divergence(losses, run.begin), alarms, follower.onsets)


def visible_divergence(losses: Series, begin: int) -> int | None:
    """Return the first step from `begin` on at which the training visibly diverges; see this module's text."""
    calm = losses[max(0, begin - 96) : begin]
    middle = float(np.median(calm)) if len(calm) else math.inf
    highest = max((float(np.median(calm[i : i + 5])) for i in range(len(calm) - 4)), default=middle)
    bound = middle + 1.5 * (highest - middle) + 0.1 * middle
    largest = max(2 * middle, 1.25 * float(calm.max())) if len(calm) else math.inf
    for step in range(begin, len(losses)):
        ahead = losses[step : step + 5]
        if not np.isfinite(losses[step]) or losses[step] > largest or (len(ahead) == 5 and np.median(ahead) > bound):
            return step
    return None


# -- runs --------------------------------------------------------------------------------------------------------------

Progress = Callable[[int, int], None]


def watch(
    run: Outcome, training: Training, monitor: StabilityMonitor, steps: int, fault: Fault, progress: Progress
) -> None:
    """Train for some steps, or until the loss is no number for three of them, and add all figures to the run."""
    first = training.step
    with monitor:
        for since in range(steps):
            fault.apply(training, since)
            loss, gradient, closure = training.train_step()
            rate = training.optimizer.param_groups[0]["lr"]
            monitor.step(loss=loss, learning_rate=rate, optimizer=training.optimizer, closure=closure)
            run.losses.append(float(loss))
            run.gradients.append(float(gradient))
            run.rates.append(rate)
            progress(since + 1, steps)
            if not np.isfinite(run.losses[-3:]).any():
                break
    known = monitor.history_steps() >= first
    histories = {"": monitor.history()} | {name: track.history() for name, track in monitor.companions.items()}
    run.rows = {"": monitor.layers} | {name: track.rows for name, track in monitor.companions.items()}
    for name, history in histories.items():
        values = torch.stack([history[statistic.name] for statistic in STATISTICS[name]], -1)[known]
        run.values[name] = torch.cat([run.values[name], values]) if name in run.values else values
    tokens = histories[""]["tokens"][known]
    run.tokens = torch.cat([run.tokens, tokens]) if len(run.tokens) else tokens


class Study:
    """The runs in a folder.

    Args:
        folder: where each run is a file.
        length: how many steps are trained.
    """

    def __init__(self, folder: Path, length: Length) -> None:
        self.folder, self.length = folder, length
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, outcome: Outcome) -> Path:
        """Return the file of a run."""
        return self.folder / f"{outcome.name}.pt"

    def read(self, outcome: Outcome) -> Outcome | None:
        """Return a finished run; None if there is none."""
        try:
            return Outcome(**torch.load(self.path(outcome)))
        except (FileNotFoundError, EOFError, RuntimeError):  # a file that was cut off does not count
            return None

    def run(self, outcome: Outcome, progress: Progress) -> Outcome:
        """Train what is missing, and return the run."""
        known = self.read(outcome)
        if known is not None:
            return known
        start = time.perf_counter()
        if outcome.kind in FAULTS:
            self._break(outcome, progress)
        else:
            self._train(outcome, progress)
        outcome.seconds = round(time.perf_counter() - start, 1)
        torch.save(vars(outcome), self.path(outcome))
        return outcome

    def _train(self, outcome: Outcome, progress: Progress) -> None:
        calm = CALM.get(outcome.kind.removeprefix("calm: "))
        schedule, dropout = calm or (constant, 0.0)
        training = self._training(outcome, schedule=schedule, dropout=dropout)
        training.lr_factor = 1.0 if calm else 30.0
        steps = self.length.calm if calm else self.length.instant
        outcome.begin = steps if calm else 0
        watch(outcome, training, monitor_of(training), steps, FAULTS["nothing"], progress)

    def _training(self, outcome: Outcome, **options: Any) -> Training:
        family = FAMILIES[outcome.family]
        family = family._replace(width=outcome.width or family.width, batch=outcome.batch or family.batch)
        return Training(
            family, outcome.seed, depth=outcome.depth, dtype=outcome.dtype,
            **{"schedule": warmed_up(constant), **options},
        )  # fmt: skip

    def _break(self, outcome: Outcome, progress: Progress) -> None:
        fault, training = FAULTS[outcome.kind], self._training(outcome)
        monitor = monitor_of(training)
        what = (outcome.family, outcome.seed, outcome.depth, outcome.width, outcome.batch, outcome.dtype)
        healthy = Outcome("healthy", *what)
        path = self.path(healthy)
        if path.exists():
            state = torch.load(path)
            training.load_state_dict(state["training"])
            monitor.load_state_dict(state["monitor"])
            healthy = Outcome(**state["run"])
        else:
            watch(healthy, training, monitor, self.length.before, FAULTS["nothing"], progress)
            state = {"training": training.state_dict(), "monitor": monitor.state_dict(), "run": vars(healthy)}
            torch.save(state, path)
        for part in ("losses", "gradients", "rates", "rows", "values", "tokens"):
            setattr(outcome, part, copy.copy(getattr(healthy, part)))
        outcome.begin = training.step
        outcome.expected = [] if fault.where == "everywhere" else sorted(training.expected(fault))
        steps = self.length.gradual if fault.gradual else self.length.instant
        watch(outcome, training, monitor, steps, fault, progress)


def monitor_of(training: Training) -> StabilityMonitor:
    """Return the monitor of a training."""
    return StabilityMonitor(training.model, companions=["attention", "weights"])


# -- tables ------------------------------------------------------------------------------------------------------------


def faults_table(runs: Sequence[Judged]) -> str:
    """Return how each kind of fault was warned of, as a Markdown table."""
    rows = []
    for kind in (*FAULTS, HOT):
        chosen = [judged for judged in runs if judged.run.kind == kind and not judged.run.is_calm]
        if chosen:
            rows.append(_fault_row(kind, chosen))
    columns = (
        "fault",
        "runs",
        "alarm",
        "diverge",
        "at once",
        "before",
        "20 before",
        "lead",
        "before loss",
        "layer",
        "scope",
    )
    return markdown_table(columns, rows)


def _fault_row(kind: str, runs: Sequence[Judged]) -> list[str]:
    alarmed = [judged for judged in runs if judged.first(OURS) is not None]
    visible = [judged for judged in runs if judged.visible is not None]
    led = [lead for judged in visible if (lead := judged.lead(OURS)) is not None]
    firsts = [(judged.first(OURS), judged.first(LOSS)) for judged in alarmed]
    ahead = [plain - ours for ours, plain in firsts if ours is not None and plain is not None]
    named = [judged.names_right for judged in runs if judged.names_right is not None]
    scoped = [judged.scope_right for judged in runs if judged.scope_right is not None]
    counts = [len(runs), len(alarmed), len(visible), *(sum(lead >= least for lead in led) for least in (0, 1, 20))]
    return [
        kind, *map(str, counts), middle(led), f"{middle(ahead)} ({len(ahead)})",
        *(f"{sum(right)} of {len(right)}" if right else "-" for right in (named, scoped)),
    ]  # fmt: skip


def middle(values: Sequence[int]) -> str:
    """Return the median."""
    return f"{np.median(values):.0f}" if values else "-"


def rules_table(runs: Sequence[Judged]) -> str:
    """Return what each rule finds in gradual faults, and its false alarms, as a Markdown table."""
    gradual = [j for j in runs if j.run.kind in FAULTS and FAULTS[j.run.kind].gradual and not j.run.is_calm]
    visible = [judged for judged in gradual if judged.visible is not None]
    calm = [judged for judged in runs if judged.run.is_calm]
    steps = sum(max(0, len(judged.run.losses) - judged.run.calm_from) for judged in calm)
    rows = []
    for rule in (OURS, *LOSS_RULES, *GRADIENT_RULES):
        led = [lead for judged in visible if (lead := judged.lead(rule)) is not None]
        alarms = [[step for step in judged.alarms[rule] if step >= judged.run.calm_from] for judged in calm]
        count, alarmed = sum(len(events(of_run)) for of_run in alarms), sum(map(len, alarms))
        rows.append([
            rule, f"{sum(judged.first(rule) is not None for judged in gradual)} of {len(gradual)}",
            f"{sum(lead > 0 for lead in led)} of {len(visible)}", middle(led),
            *((f"{1e4 * count / steps:.1f} ({count} in {steps:,})", f"{alarmed / steps:.2%}") if steps else "--"),
        ])  # fmt: skip
    columns = (
        "rule", "gradual faults found", "before they are visible", "lead", "false alarms per 10,000 steps",
        "calm steps with an alarm",
    )  # fmt: skip
    return markdown_table(columns, rows)


def tables(runs: Sequence[Judged]) -> Iterator[str]:
    """Return the tables of all runs."""
    yield faults_table(runs)
    yield rules_table(runs)


# -- command line ------------------------------------------------------------------------------------------------------


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
