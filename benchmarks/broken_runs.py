"""The runs of `benchmarks.early_warning`: what is trained, broken and watched, and the file that each run is."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.faulty_trainings import CALM, FAMILIES, FAULTS, Dtype, Fault, Training, constant, warmed_up
from stabnorm import StabilityMonitor
from stabnorm.companions import AttentionCompanion, WeightCompanion
from stabnorm.monitor.statistics import resolve
from stabnorm.statistic import Statistic

STATISTICS: dict[str, tuple[Statistic, ...]] = {
    "": resolve("standard"), "attention": AttentionCompanion.statistics, "weights": WeightCompanion.statistics,
}  # fmt: skip
ARMED = 256


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
