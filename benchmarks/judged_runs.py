"""What rules say of the runs of `benchmarks.early_warning`, and its tables."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.broken_runs import STATISTICS, Outcome
from benchmarks.faulty_trainings import FAULTS
from benchmarks.peer_rules import GRADIENT_RULES, LOSS_RULES, Series, events
from stabnorm import Alert
from stabnorm.monitor.alerts import Departure
from stabnorm.monitor.detect import RobustDetector, watched_together
from stabnorm.monitor.onsets import Onset, OnsetFollower, Watched
from stabnorm.monitor.record import Block
from stabnorm.monitor.spikes import Spikes
from stabnorm.monitor.training_series import TrainingSeries
from stabnorm.statistic import markdown_table

OURS, BEFORE, LOSS = "stabnorm", "stabnorm, before the optimizer", "loss, by our rule"
AT_ONCE = ("Lightning SpikeDetection", "OLMo-core, gradient norm", "ZClip")
AMAX = [statistic.name for statistic in STATISTICS[""]].index("amax")
FLUSH = 50
HOT = "learning rate x30 from the start"


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
    watched_together(detectors.values())
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
    alarms = {OURS: sorted(alert.step for alert in alerts), BEFORE: list(refused_steps(run))}
    alarms |= {name: list(rule(losses)) for name, rule in LOSS_RULES.items()}
    alarms |= {name: list(rule(gradients)) for name, rule in GRADIENT_RULES.items()}
    return Judged(run, visible_divergence(losses, run.begin), alarms, follower.onsets)


def refused_steps(run: Outcome) -> Iterator[int]:
    """Return the steps that `StabilityMonitor.verdict_before_step(spikes=True)` calls bad, before they are applied."""
    spikes = Spikes(run.rows[""])
    largest = run.values[""][..., AMAX].double().numpy()
    for step, sizes in enumerate(np.column_stack([run.losses, run.gradients, largest])):
        if not np.isfinite(sizes).all():
            yield step
        elif spikes.judge([], sizes.tolist()) is not None:
            if spikes.lasts:
                spikes.forget()
            else:
                yield step


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


def at_once_table(runs: Sequence[Judged]) -> str:
    """Return how soon each kind of fault that is there at once is found, as a Markdown table."""

    def found(chosen: Sequence[Judged], rule: str, within: int) -> str:
        firsts = [(judged.first(rule), judged.run.begin) for judged in chosen]
        return str(sum(first is not None and first - begin <= within for first, begin in firsts))

    rows = []
    for kind in [kind for kind, fault in FAULTS.items() if not fault.gradual]:
        chosen = [judged for judged in runs if judged.run.kind == kind]
        if chosen:
            asked = ((BEFORE, 0), (OURS, 0), (OURS, 1), *((rule, 0) for rule in AT_ONCE))
            families = {judged.run.family for judged in chosen}
            rows.append([kind, str(len(families)), str(len(chosen)), *(found(chosen, *one) for one in asked)])
    columns = (
        "fault that is there at once", "families", "runs", "refused before the optimizer", "alarm in its step",
        "one step later at most", *(f"{rule}, in its step" for rule in AT_ONCE),
    )  # fmt: skip
    return markdown_table(columns, rows)


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
    for rule in (OURS, BEFORE, *LOSS_RULES, *GRADIENT_RULES):
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
    yield at_once_table(runs)
    yield rules_table(runs)
