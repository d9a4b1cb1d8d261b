"""Alarms on the logs of other people's trainings: `python -m benchmarks.public_logs --data PATH`.

The detector of the loss and of the gradient's norm, and the action "skip" for spikes, beside the rules of others on the
same logs. PATH is a folder with
`load.py` whose `load()` returns logs with a verdict each (84 curves from public repositories, 106,000 points); it is
not part of the project. PATH may also be a log of your own, a `trainer_state.json` or a `metrics.csv`, or a folder of
them: then each is looked at.

Alarms within 100 points of each other count once, for every rule. Calm and noisy logs count false alarms per 10,000
points; logs with a spike or a divergence count if they are alarmed at all. The detector's constants are those of a
study of other runs. One constant was chosen with these logs in view: the loss counts as lost at ten times its lowest
median, which one of them needs. The table is printed for two halves of the logs, too.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.peer_rules import GRADIENT_RULES, LOSS_RULES, Rule, events
from stabnorm.dashboard.training_log import log_report, logs_below
from stabnorm.monitor.spikes import Spikes
from stabnorm.monitor.training_series import TrainingSeries

Series = npt.NDArray[np.float64]
Log = Mapping[str, Any]
CATEGORIES = ("calm", "noisy", "spike", "diverged", "grad-spike")
CALM = CATEGORIES[:2]


def load(folder: Path) -> list[Log]:
    """Return the logs of a folder, by its own `load.py`."""
    spec = importlib.util.spec_from_file_location("public_logs_load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logs: list[Log] = module.load()
    return logs


def ours(*names: str) -> Callable[[Log], list[int] | None]:
    """Return our detector on some series of a log; it gives None where a log has none of them."""
    keys = {"loss": "loss", "gradient_norm": "grad_norm"}

    def alarms(log: Log) -> list[int] | None:
        series = {name: log[keys[name]] for name in names if log[keys[name]] is not None}
        if not series:
            return None
        bad = ~np.isfinite(log["loss"]) if "loss" in series else None
        return events(sorted(alert.step for alert in TrainingSeries().update(0, series, bad)))

    return alarms


def skipped(key: str) -> Callable[[Log], list[int] | None]:
    """Return the steps that the action "skip" would leave out for spikes of the loss, or of the gradient's norm."""

    def steps(log: Log) -> list[int] | None:
        if log[key] is None:
            return None
        spikes, left_out = Spikes([]), []
        for step, value in enumerate(log[key]):
            beside = [value, math.nan] if key == "loss" else [math.nan, value]
            if spikes.judge([], beside) is None:
                continue
            if spikes.lasts:
                spikes.forget()
            else:
                left_out.append(step)
        return events(left_out)

    return steps


def peer(key: str, rule: Rule) -> Callable[[Log], list[int] | None]:
    """Return a rule of others on one series of a log."""

    def alarms(log: Log) -> list[int] | None:
        return None if log[key] is None else events(rule(log[key]))

    return alarms


RULES: dict[str, Callable[[Log], list[int] | None]] = {
    "stabnorm, loss and gradient norm": ours("loss", "gradient_norm"),
    "stabnorm, loss": ours("loss"),
    "stabnorm, gradient norm": ours("gradient_norm"),
    "stabnorm, skipped by the loss": skipped("loss"),
    "stabnorm, skipped by the gradient norm": skipped("grad_norm"),
    **{name: peer("loss", rule) for name, rule in LOSS_RULES.items()},
    **{name: peer("grad_norm", rule) for name, rule in GRADIENT_RULES.items()},
}


def row(logs: Sequence[Log], found: Mapping[str, list[int] | None]) -> list[str]:
    """Return the cells of a rule: false alarms per 10,000 points of calm and noisy logs, and events alarmed."""
    cells = []
    for category in CATEGORIES:
        known = [
            (log, alarms) for log in logs if log["category"] == category and (alarms := found[log["id"]]) is not None
        ]
        if not known:
            cells.append("-")
        elif category in CALM:
            points, count = sum(len(log["step"]) for log, _ in known), sum(len(alarms) for _, alarms in known)
            of = f"{sum(bool(alarms) for _, alarms in known)} of {len(known)} logs"
            cells.append(f"{1e4 * count / points:.1f} ({of})")
        else:
            cells.append(f"{sum(bool(alarms) for _, alarms in known)}/{len(known)}")
    return cells


def table(logs: Sequence[Log], found: Mapping[str, Mapping[str, list[int] | None]]) -> str:
    """Return the table as Markdown."""
    lines = ["| rule | " + " | ".join(CATEGORIES) + " |", "|---" * (len(CATEGORIES) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row(logs, alarms))} |" for name, alarms in found.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or a report on logs of the user's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder of the logs, or a log, or a folder of logs"
    )
    options = parser.parse_args(arguments)
    if not (options.data / "load.py").is_file():
        reports = [log_report(path) for path in logs_below(options.data)]
        print("\n".join(reports) or f"there is no trainer_state.json and no metrics.csv in {options.data}")
        return
    logs = load(options.data)
    found = {name: {log["id"]: rule(log) for log in logs} for name, rule in RULES.items()}
    halves = {
        "all": logs,
        "odd numbers": [log for log in logs if int(log["id"].rpartition("-")[2]) % 2],
        "even numbers": [log for log in logs if not int(log["id"].rpartition("-")[2]) % 2],
    }
    for half, part in halves.items():
        points = sum(len(log["step"]) for log in part)
        print(f"\n### {half}: {len(part)} logs, {points:,} points\n\n{table(part, found)}")
    first = found["stabnorm, loss and gradient norm"]
    missed = [log["id"] for log in logs if log["category"] in ("spike", "diverged") and not first[log["id"]]]
    print(f"\nnot alarmed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
