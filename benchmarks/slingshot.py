"""Measure how early loss spikes that arise by themselves are warned of: `python -m benchmarks.slingshot`.

A transformer of two layers learns to add numbers modulo 97, with Adam and without weight decay. Once it has nearly
learnt its data, its loss spikes now and then (slingshots). Each run is watched by the companion "curvature", also as if
it had fewer samples. Beside it stand a rule on the gradient norm and one on the loss: the logarithm is six robust
standard deviations above the median of the last 128 steps at two steps, or twelve at one.

A spike begins where the mean of ten steps of log10(loss) is more than 1, and six robust standard deviations, above the
200 steps before. A warning counts for it if it comes in the 500 steps before; the lead is that of the first such
warning. A warning that is within 500 steps of no spike is a false alarm; those within 500 steps of another count once.
The steps from 500 on count.

Constants were chosen on the seeds 0 to 3; the figures to quote are those of the seeds 10 to 13. Every run is a line of
`runs/slingshot.jsonl`; existing runs are not repeated. A run of 3,000 steps takes about two minutes on one core.

Args: --seeds N ..., --steps N, --every N, --settings NAME ..., --out FILE, --table.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peer_rules import Series, above_past
from stabnorm import StabilityMonitor
from stabnorm.companions import CurvatureCompanion

PRIME, WIDTH, HEADS = 97, 64, 4
RARER = (1, 2, 4, 10)  # which samples count: every one, every second, ...
CALIBRATION, TEST = (0, 1, 2, 3), (10, 11, 12, 13)
FIRST, REACH = 500, 500  # the first step that counts, and how far before a spike a warning counts


class Setting(NamedTuple):
    """Learning rate, beta2 of Adam, and the share of all sums that is learnt."""

    learning_rate: float
    beta2: float
    share: float


SETTINGS = {
    "base": Setting(1e-3, 0.98, 0.3),
    "learning rate x2": Setting(2e-3, 0.98, 0.3),
    "beta2 0.95": Setting(1e-3, 0.95, 0.3),
}


class Block(nn.Module):
    """A pre-norm block of causal attention and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, tokens, width] to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y: Tensor = x + self.feed(self.norm2(x))
        return y


class Adder(nn.Module):
    """Gives the logits of (a + b) mod 97 for the tokens a, b and "="."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(PRIME + 1, WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(3, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PRIME)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 3] to [batch, 97]."""
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(x) + self.positions)[:, -1]))
        return logits


@dataclass
class Outcome:
    """The line of one run."""

    setting: str
    seed: int
    steps: int
    every: int
    spikes: list[int] = field(default_factory=list)
    warnings: dict[str, list[int]] = field(default_factory=dict)  # their steps, by rule
    samples: list[tuple[int, float]] = field(default_factory=list)  # step and curvature
    loss: float = math.nan
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, int, int, int]:
        """The values that identify this run."""
        return self.setting, self.seed, self.steps, self.every


def sums(share: float) -> tuple[Tensor, Tensor]:
    """Return the sums that are learnt, always the same ones: tokens [n, 3] and results [n]."""
    numbers = torch.arange(PRIME)
    pairs = torch.cartesian_prod(numbers, numbers)
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[: int(share * len(pairs))]
    pairs = pairs[chosen]
    return torch.cat([pairs, torch.full((len(pairs), 1), PRIME)], 1), pairs.sum(1) % PRIME


def run(outcome: Outcome, progress: Callable[[int, float], None]) -> Outcome:
    """Train once, and fill in the outcome."""
    setting = SETTINGS[outcome.setting]
    x, y = sums(setting.share)
    torch.manual_seed(outcome.seed)
    model = Adder()
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.learning_rate, betas=(0.9, setting.beta2))
    batches = torch.Generator().manual_seed(outcome.seed + 1000)
    losses, gradients = [], []
    start = time.perf_counter()
    with StabilityMonitor(model, ["amax"], companions=[CurvatureCompanion(outcome.every)]) as monitor:
        for step in range(outcome.steps):
            for group in optimizer.param_groups:
                group["lr"] = setting.learning_rate * min(1, (step + 1) / 100)
            rows = torch.randint(len(x), (256,), generator=batches)

            def closure(rows: Tensor = rows) -> Tensor:
                return F.cross_entropy(model(x[rows]), y[rows])

            optimizer.zero_grad()
            loss = closure()
            loss.backward()
            gradients.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
            optimizer.step()
            monitor.step(loss=loss, closure=closure)
            losses.append(loss.item())
            progress(step + 1, losses[-1])
    curvature = monitor.companions["curvature"].history()["update_curvature"][:, 0].tolist()
    outcome.samples = [(step, value) for step, value in enumerate(curvature) if not math.isnan(value)]
    outcome.spikes = onsets(np.array(losses))
    outcome.warnings = {f"curvature, every {n * outcome.every} steps": over(outcome.samples[::n]) for n in RARER}
    outcome.warnings["gradient norm"] = list(above_past(np.array(gradients)))
    outcome.warnings["loss"] = list(above_past(np.array(losses)))
    outcome.loss, outcome.seconds = losses[-1], time.perf_counter() - start
    return outcome


def is_calm(step: int, spikes: Sequence[int]) -> bool:
    """Whether a step is far from all spikes."""
    return all(abs(step - spike) > REACH for spike in spikes)


def onsets(losses: Series) -> list[int]:
    """Return the steps at which spikes begin."""
    logs, begins = np.log10(np.maximum(losses, 1e-12)), list[int]()
    for step in range(220, len(logs)):
        before = logs[step - 209 : step - 9]
        middle = float(np.median(before))
        scale = 1.4826 * float(np.median(np.abs(before - middle))) + 1e-6
        rise = float(logs[step - 9 : step + 1].mean()) - middle
        if (rise > max(1, 6 * scale) or not np.isfinite(losses[step])) and (not begins or step - begins[-1] > 300):
            begins.append(step)
    return begins


def over(samples: Sequence[tuple[int, float]]) -> list[int]:
    """Return the steps from which on two of eight samples are above 1: the companion's own rule."""
    above = [value > 1 for _, value in samples]
    lasting = [sum(above[max(0, i - 7) : i + 1]) >= 2 for i in range(len(above))]
    return [step for i, (step, _) in enumerate(samples) if lasting[i] and not (i and lasting[i - 1])]


def leads(outcome: Outcome, rule: str) -> list[int | None]:
    """Return by how many steps each spike was warned of; None where it was not."""
    steps = [step for step in outcome.warnings[rule] if step >= FIRST]
    found = [[spike - step for step in steps if spike - REACH <= step < spike] for spike in outcome.spikes]
    return [max(candidates, default=None) for candidates in found]


def false_alarms(outcome: Outcome, rule: str) -> int:
    """Count the warnings that are far from all spikes and from an earlier one."""
    count, last = 0, -REACH - 1
    for step in outcome.warnings[rule]:
        if step >= FIRST and is_calm(step, outcome.spikes) and step - last > REACH:
            count, last = count + 1, step
    return count


def table(outcomes: Sequence[Outcome]) -> str:
    """Return leads and false alarms of each rule as a Markdown table, for calibration and test seeds."""
    lines = ["| seeds | rule | spikes warned of | lead, steps | median | false alarms |", "|---|---|---|---|---|---|"]
    others = sorted({outcome.seed for outcome in outcomes} - {*CALIBRATION, *TEST})
    for name, seeds in (("calibration", CALIBRATION), ("test", TEST), ("others", others)):
        chosen = [outcome for outcome in outcomes if outcome.seed in seeds]
        calm = sum(is_calm(step, o.spikes) for o in chosen for step in range(FIRST, o.steps))
        for rule in chosen[0].warnings if chosen else ():
            each = [lead for outcome in chosen for lead in leads(outcome, rule)]
            known = [lead for lead in each if lead is not None]
            shown = ", ".join("-" if lead is None else str(lead) for lead in each) or "-"
            median = f"{np.median(known):.0f}" if known else "-"
            alarms = f"{sum(false_alarms(outcome, rule) for outcome in chosen)} in {calm:,} calm steps"
            lines.append(f"| {name} | {rule} | {len(known)} of {len(each)} | {shown} | {median} | {alarms} |")
    return "\n".join(lines)


def read(path: Path) -> list[Outcome]:
    """Return the runs that a file has."""
    if not path.exists():
        return []
    return [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slingshot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(TEST))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["base"])
    parser.add_argument("--out", type=Path, default=Path("runs") / "slingshot.jsonl")
    parser.add_argument("--table", action="store_true", help="only print the table of the runs that exist")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    wanted = [Outcome(name, seed, options.steps, options.every) for name in options.settings for seed in options.seeds]
    known = {outcome.key for outcome in read(options.out)}
    for outcome in [] if options.table else [outcome for outcome in wanted if outcome.key not in known]:

        def progress(step: int, loss: float, of: Outcome = outcome) -> None:
            if step % 50 == 0 or step == of.steps:
                done = 30 * step // of.steps
                bar = "#" * done + "-" * (30 - done)
                end = "\n" if step == of.steps else ""
                text = f"\r{of.setting}, seed {of.seed} [{bar}] {step}/{of.steps} loss {loss:.1e}"
                print(text, end=end, file=sys.stderr, flush=True)

        run(outcome, progress)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
    keys = {outcome.key for outcome in wanted}
    print(table([outcome for outcome in read(options.out) if outcome.key in keys]))


if __name__ == "__main__":
    main()
