"""A look at a training that was made without this package: its log's loss and gradient norm, and where they broke.

It reads what trainers write: `trainer_state.json` of Hugging Face's Trainer, `metrics.csv` of Lightning's CSVLogger,
any other CSV file with a column of losses, and files with a JSON object on each line.
"""

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stabnorm.dashboard.text import number

# The names that trainers give their columns, the surest first; compared without case and without "train" in front.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "step": ("step", "global_step", "iteration", "iter", "time/total_timesteps", "global_steps"),
    "loss": ("loss", "loss_step", "total_loss", "value_loss", "nll_loss", "loss_epoch"),
    "gradient_norm": ("grad_norm", "gradient_norm", "grad_norm_step", "grad_2.0_norm_total", "gnorm"),
    "learning_rate": ("learning_rate", "lr"),
}
_PREFIXES = ("train/", "train_", "training/", "training_")
_SHOWN = 20  # alerts in a report


class TrainingLog(NamedTuple):
    """The points of a log, one for each value of the loss.

    Attributes:
        steps: ``[points]``, the step of each point as the log counts them, or its place in the file.
        series: "loss" and, if the log has them, "gradient_norm" and "learning_rate", ``[points]`` each.
    """

    steps: npt.NDArray[np.int64]
    series: Mapping[str, npt.NDArray[np.float64]]


def read_training_log(path: str | Path) -> TrainingLog:
    """Read the log of a training.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has no loss in a form that is known.
    """
    path = Path(path)
    try:
        points = _points(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no text that a trainer writes: {error}") from error
    columns = _columns(points)
    if "loss" not in columns:
        names = ", ".join(sorted({name for point in points for name in point})[:12]) or "nothing"
        raise ValueError(
            f"{path} has no loss that is known. Its points have: {names}. Give a trainer_state.json, a metrics.csv, or "
            "another CSV file or lines of JSON with a column 'loss', and 'step' and 'grad_norm' if there are any"
        )
    rows = [point for point in points if _value(point.get(columns["loss"])) is not None]
    series = {
        name: np.array([np.nan if (value := _value(row.get(column))) is None else value for row in rows])
        for name, column in columns.items()
    }
    steps = series.pop("step", np.arange(len(rows), dtype=np.float64))
    known = np.where(np.isfinite(steps), steps, np.arange(len(rows)))
    return TrainingLog(known.astype(np.int64), series)


def _points(path: Path) -> list[Mapping[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] in ("{", "["):
        try:
            whole = json.loads(text)
        except ValueError:
            lines = [_json(line) for line in text.splitlines() if line.strip()]
            return [line for line in lines if isinstance(line, dict)]
        if isinstance(whole, dict):
            whole = whole.get("log_history", [whole])
        return [point for point in whole if isinstance(point, dict)] if isinstance(whole, list) else []
    return list(csv.DictReader(text.splitlines()))


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # the last line of a run that was killed
        return None


def _columns(points: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return which column holds what, by the names that trainers use."""
    given: dict[str, str] = {}
    for point in points:
        for name in point:
            if isinstance(name, str):
                given.setdefault(_short(name), name)
    found = {what: next((given[name] for name in names if name in given), None) for what, names in _NAMES.items()}
    return {what: name for what, name in found.items() if name is not None}


def _short(name: str) -> str:
    name = name.strip().lower()
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def _value(cell: Any) -> float | None:
    """Read a number, NaN and infinities included; None for an empty cell or a text."""
    if cell is None or isinstance(cell, bool) or (isinstance(cell, str) and not cell.strip()):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def log_report(path: str | Path) -> str:
    """Return a report on the log of a training, as Markdown: where loss or gradient norm left their usual range.

    Raises:
        OSError: it cannot be read.
        ValueError: it has no loss in a form that is known.
    """
    from stabnorm.monitor.onsets import OnsetFollower, Watched
    from stabnorm.monitor.training_series import TrainingSeries
    from stabnorm.monitor.words import rests_on

    log = read_training_log(path)
    watched, follower = TrainingSeries(), OnsetFollower()
    alerts = watched.update(0, log.series, ~np.isfinite(log.series["loss"]))
    follower.add(alerts, watched.take_departures(), Watched((), steps=len(log.steps)))
    names = " and ".join(
        "gradient norm" if name == "gradient_norm" else name for name in log.series if name != "learning_rate"
    )
    lines = [f"# {Path(path).name}", "", f"{len(log.steps):,} points, {names}. {rests_on(len(log.steps), 256)}", ""]
    if not len(log.steps):
        return "\n".join([*lines[:2], "It has no point."]) + "\n"
    at = [int(log.steps[alert.step]) for alert in alerts]
    if not alerts:
        lines.append(f"**Nothing left its usual range** up to step {int(log.steps[-1]):,}.")
    for onset in follower.onsets[:_SHOWN]:
        named = dataclasses.replace(onset, step=int(log.steps[onset.step]))
        lines += [f"## Step {named.step:,}", "", f"{onset.sentence.replace(f'{onset.step:,}', f'{named.step:,}')}", ""]
        lines += [f"- Look: {onset.advice}", f"- Try: {onset.remedy.replace(f'{onset.step:,}', f'{named.step:,}')}", ""]
    if alerts:
        rows = [
            f"| {step:,} | {alert.statistic} | {number(alert.value)} | {number(alert.usual)} | {alert.reason} |"
            for step, alert in zip(at[:_SHOWN], alerts, strict=False)
        ]
        lines += ["| step | series | value | usual | what happened |", "|---:|---|---:|---:|---|", *rows]
        lines += [f"\nand {len(alerts) - _SHOWN} more"] if len(alerts) > _SHOWN else []
    return "\n".join(lines).rstrip() + "\n"


def write_log_report(path: str | Path, output: str | Path | None) -> str:
    """Return the report, or write it and return a sentence that says where it is."""
    text = log_report(path)
    if output is None:
        return text
    Path(output).write_text(text, encoding="utf-8")
    return f"the report is in {output}"


def logs_below(path: str | Path) -> Iterable[Path]:
    """Yield a file, or every `trainer_state.json` and `metrics.csv` below a folder."""
    path = Path(path)
    if path.is_file():
        yield path
        return
    for name in ("trainer_state.json", "metrics.csv"):
        yield from sorted(path.rglob(name))
