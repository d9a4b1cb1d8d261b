"""The table at the end of a run: the few layers that a user should look at, and why."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stabnorm._log import printable
from stabnorm.dashboard.text import number, shorten
from stabnorm.monitor.baseline import ARMED
from stabnorm.monitor.record import SIDE_SERIES

_MOVED = 3  # rows, and the factor from which on a change of scale is told
_SCALES = ("token_std_mean", "amax")  # of which it is told, the first that is watched
_TAIL = 10  # what is said of the run's end is of its last tenth
_WIDTH = 100
_INDENT = " " * 4

Array = npt.NDArray[Any]


class Row(NamedTuple):
    """A layer that the user should look at.

    Attributes:
        layer: its name.
        reason: one sentence.
        statistic: the statistic that stood out.
        value: its value.
        step: the step; the last one if the reason is about the end of the run.
        fault: whether something may be wrong; False if the row is only information.
    """

    layer: str
    reason: str
    statistic: str
    value: float
    step: int
    fault: bool = True


def layers_worth_a_look(
    layers: Sequence[str],
    series: Mapping[str, Array],
    alerts: Sequence[Mapping[str, Any]],
    *,
    steps: Sequence[int] | Array | None = None,
    thresholds: Mapping[str, tuple[float, str]] | None = None,
    least: Mapping[str, tuple[float, str]] | None = None,
) -> list[Row]:
    """Name the layers with alerts, then those that stay beyond a threshold or never ran, then those that moved most.

    A layer is named once. Moved: the median scale of its input over the last tenth of the run is three times, or a
    third of, that of the first half, of which the first tenth is left out. A healthy run has no row.

    Args:
        layers: names.
        series: statistic -> [steps, layers]; `tokens` tells which ran, other series are passed over.
        alerts: as they were recorded: with `step`, `layer`, `statistic`, `value` and `reason`.
        steps: the step of each row. Default: 0, 1, ...
        thresholds: statistic -> what its median over the last tenth should not exceed, and what to do when it does.
            Default: none.
        least: the same for what it should not fall below. Default: none.

    Example:
        >>> amax = np.array([[1.0, 2.0, 90.0]] * 20)
        >>> (row,) = layers_worth_a_look("abc", {"amax": amax}, [], thresholds={"amax": (50, "clip it")})
        >>> row.layer, row.reason
        ('c', "over 50 in most of the run's last tenth: clip it")
    """
    statistics = {name: np.asarray(a, np.float64) for name, a in series.items() if name not in SIDE_SERIES}
    num_steps = max(map(len, statistics.values()), default=0)
    numbers = np.arange(num_steps) if steps is None else np.asarray(steps)
    rows = list(_alerted(alerts))
    if num_steps:
        tail = {name: _median(values[-max(1, num_steps // _TAIL) :]) for name, values in statistics.items()}
        last = int(numbers[-1])
        rows += _over(layers, tail, thresholds or {}, last)
        rows += _under(layers, tail, least or {}, last)
        rows += _idle(layers, statistics, series.get("tokens"), last)
        rows += _moved(layers, statistics, tail, last)
    first: dict[str, Row] = {}
    for row in rows:
        seen = first.setdefault(row.layer, row)
        if seen is not row and not row.fault:  # what came of it
            first[row.layer] = seen._replace(reason=f"{seen.reason}. {row.reason[0].upper()}{row.reason[1:]}")
    moved = [row for row in first.values() if not row.fault]
    return [row for row in first.values() if row.fault] + moved[:_MOVED]


def _alerted(alerts: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """In the order they came."""
    for alert in sorted(alerts, key=lambda alert: int(alert["step"])):
        others = sum(other["layer"] == alert["layer"] for other in alerts) - 1
        reason = f"{alert['reason']} ({others} more alert{'s'[: others > 1]})" if others else str(alert["reason"])
        yield Row(alert["layer"], reason, alert["statistic"], float(alert["value"]), int(alert["step"]))


def _over(
    layers: Sequence[str], tail: Mapping[str, Array], thresholds: Mapping[str, tuple[float, str]], last: int
) -> Iterator[Row]:
    """The furthest over its threshold first."""
    over = [
        ((tail[name][i] - threshold) / (abs(threshold) or 1.0), i, name)
        for name, (threshold, _) in thresholds.items()
        for i in np.flatnonzero(tail.get(name, np.empty(0)) > threshold).tolist()
    ]
    for _, i, name in sorted(over, reverse=True):
        threshold, advice = thresholds[name]
        reason = f"over {number(threshold)} in most of the run's last tenth: {advice}"
        yield Row(layers[i], reason, name, float(tail[name][i]), last)


def _under(
    layers: Sequence[str], tail: Mapping[str, Array], least: Mapping[str, tuple[float, str]], last: int
) -> Iterator[Row]:
    """In depth order."""
    for name, (bound, advice) in least.items():
        for i in np.flatnonzero(tail.get(name, np.empty(0)) < bound).tolist():
            reason = f"under {number(bound)} in most of the run's last tenth: {advice}"
            yield Row(layers[i], reason, name, float(tail[name][i]), last)


def _idle(layers: Sequence[str], statistics: Mapping[str, Array], tokens: Array | None, last: int) -> Iterator[Row]:
    ran = np.any([~np.isnan(values).all(axis=0) for values in statistics.values()], axis=0)
    if tokens is not None:
        ran &= np.nansum(tokens, axis=0) > 0
    for i in np.flatnonzero(~ran).tolist():
        yield Row(layers[i], "saw no valid token in training", "tokens", 0.0, last)


def _moved(
    layers: Sequence[str], statistics: Mapping[str, Array], tail: Mapping[str, Array], last: int
) -> Iterator[Row]:
    """The furthest first."""
    name = next((name for name in _SCALES if name in statistics), None)
    if name is None:
        return
    values, late = statistics[name], tail[name]
    early = _median(values[len(values) // _TAIL : max(1, len(values) // 2)])
    known = np.isfinite(early) & np.isfinite(late) & (early > 0) & (late > 0)
    log = np.zeros(len(layers))
    log[known] = np.log(late[known] / early[known])
    far = np.abs(log) > np.log(_MOVED)
    count = f"{int(far.sum())} of {len(far)} layers grew or shrank {_MOVED} times or more"
    for rank, i in enumerate(np.argsort(-np.abs(log), kind="stable")[: int(far.sum())].tolist()):
        way = f"grew {number(np.exp(log[i]))} times" if log[i] > 0 else f"shrank to {number(np.exp(log[i]))} of it"
        reason = f"the scale of its input {way} since the first half of the run{'' if rank else f'; {count}'}"
        yield Row(layers[i], reason, name, float(late[i]), last, fault=False)


def _median(values: Array) -> Array:
    """Over the steps, NaN for a layer that did not run."""
    out = np.full(values.shape[1], np.nan)
    ran = ~np.isnan(values).all(axis=0)
    out[ran] = np.nanmedian(values[:, ran], axis=0)
    return out


def format_table(rows: Sequence[Row], *, steps: int, compared: bool = True, most: int = 8) -> str:
    """Lay the rows out as plain text of at most 100 columns.

    Args:
        rows: from `layers_worth_a_look`.
        steps: how many the run had.
        compared: whether the detector has begun to compare the layers with their usual range. Default: True.
        most: rows shown; of the others only the number is said. Default: 8.

    Example:
        >>> print(format_table([Row("encoder.norm", "amax jumped", "amax", 5120.0, 204)], steps=1000))
        stabnorm: 1 layer worth a look in 1,000 steps
        layer                                           statistic                  value        step
        encoder.norm                                    amax                       5,120         204
            amax jumped
    """
    lines = textwrap.wrap(_verdict(rows, steps, compared), _WIDTH)
    if rows:
        lines.append(_line("layer", "statistic", "value", "step"))
    names = shorten([printable(row.layer) for row in rows], 46)
    for row, name in list(zip(rows, names, strict=True))[:most]:
        lines.append(_line(name, row.statistic, number(row.value), f"{row.step:,}"))
        lines += textwrap.wrap(row.reason, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    if len(rows) > most:
        lines.append(f"and {len(rows) - most} more")
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row], *, steps: int | None = None, compared: bool = True, most: int = 8) -> str:
    """Lay the rows out as Markdown.

    Args:
        rows: from `layers_worth_a_look`.
        steps: how many the run had. Default: this is not said.
        compared: as in `format_table`.
        most: rows shown; of the others only the number is said. Default: 8.
    """
    verdict = _verdict(rows, steps, compared)
    if not rows:
        return verdict
    lines = ["| layer | statistic | value | step |", "|---|---|---:|---:|"]
    reasons = []  # below the table: beside it they would squeeze the other columns
    for row in rows[:most]:
        layer = row.layer.replace("|", "\\|")
        lines.append(f"| `{layer}` | `{row.statistic}` | {number(row.value)} | {row.step:,} |")
        reasons.append(f"* `{row.layer}`: {row.reason}")
    more = f"\n\nand {len(rows) - most} more" if len(rows) > most else ""
    return "\n".join([verdict, "", *lines, "", *reasons]) + more


def _verdict(rows: Sequence[Row], steps: int | None, compared: bool) -> str:
    """One sentence, which says what it rests on where that is less than it seems."""
    faults = sum(row.fault for row in rows)
    after = _in(steps, "in")
    if faults:
        return f"stabnorm: {faults} layer{'s'[: faults > 1]} worth a look{after}"
    if compared:
        return f"stabnorm: nothing alarming was seen{after}"
    return (
        f"stabnorm: no fixed bound was passed{after}; "
        f"layers are compared with their usual range only after {ARMED} steps"
    )


def _in(steps: int | None, word: str) -> str:
    return "" if steps is None else f" {word} {steps:,} step{'s'[: steps != 1]}"


def _line(layer: str, statistic: str, value: str, step: str) -> str:
    return f"{layer:<46}  {statistic:<22} {value:>9}  {step:>10}"
