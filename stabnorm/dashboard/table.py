"""The closing table: the few layers a user should look at after a run, and why."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stabnorm.dashboard.text import number, shorten
from stabnorm.monitor.record import SIDE_SERIES

_FURTHEST = 3
_TAIL = 10  # what is said of the run's end is of its last tenth
_WIDTH = 100
_INDENT = " " * 4

Array = npt.NDArray[Any]


class Row(NamedTuple):
    """A layer worth a look.

    Attributes:
        layer: its name.
        reason: one sentence.
        statistic: that stood out.
        value: of the statistic.
        step: when; the last one for what is said of the end of the run.
        fault: whether something may be wrong; False for what is only said for information.
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
    thresholds: Mapping[str, float] | None = None,
) -> list[Row]:
    """Name the layers with alerts, then those that stay over a threshold or never ran, then the three furthest out.

    A layer is named once. The three are always there, so that a healthy run has a table too: of the last tenth of the
    run, they lie furthest from the median layer, measured on the scale by which layers differ.

    Args:
        layers: names.
        series: statistic -> [steps, layers]; `tokens` tells which ran, other series are passed over.
        alerts: as they were recorded: with `step`, `layer`, `statistic`, `value` and `reason`.
        steps: the step of each row. Default: 0, 1, ...
        thresholds: statistic -> what its median over the last tenth should not exceed. Default: none.

    Example:
        >>> amax = np.array([[1.0, 2.0, 90.0]] * 20)
        >>> [(row.layer, row.fault) for row in layers_worth_a_look("abc", {"amax": amax}, [], thresholds={"amax": 50})]
        [('c', True), ('a', False), ('b', False)]
    """
    statistics = {name: np.asarray(a, np.float64) for name, a in series.items() if name not in SIDE_SERIES}
    num_steps = max(map(len, statistics.values()), default=0)
    numbers = np.arange(num_steps) if steps is None else np.asarray(steps)
    rows = list(_alerted(alerts))
    if num_steps:
        tail = {name: _median(values[-max(1, num_steps // _TAIL) :]) for name, values in statistics.items()}
        last = int(numbers[-1])
        rows += _over(layers, tail, thresholds or {}, last)
        rows += _idle(layers, statistics, series.get("tokens"), last)
        named = {row.layer for row in rows}
        rows += [row for row in _furthest(layers, tail, last) if row.layer not in named][:_FURTHEST]
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.layer, row)
    return list(first.values())


def _alerted(alerts: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """In the order they came."""
    for alert in sorted(alerts, key=lambda alert: int(alert["step"])):
        others = sum(other["layer"] == alert["layer"] for other in alerts) - 1
        reason = f"{alert['reason']} ({others} more alert{'s'[: others > 1]})" if others else str(alert["reason"])
        yield Row(alert["layer"], reason, alert["statistic"], float(alert["value"]), int(alert["step"]))


def _over(
    layers: Sequence[str], tail: Mapping[str, Array], thresholds: Mapping[str, float], last: int
) -> Iterator[Row]:
    """The furthest over its threshold first."""
    over = [
        (tail[name][i] / threshold, i, name)
        for name, threshold in thresholds.items()
        for i in np.flatnonzero(tail.get(name, np.empty(0)) > threshold).tolist()
    ]
    for _, i, name in sorted(over, reverse=True):
        reason = f"over {number(thresholds[name])} in most of the run's last tenth"
        yield Row(layers[i], reason, name, float(tail[name][i]), last)


def _idle(layers: Sequence[str], statistics: Mapping[str, Array], tokens: Array | None, last: int) -> Iterator[Row]:
    ran = np.any([~np.isnan(values).all(axis=0) for values in statistics.values()], axis=0)
    if tokens is not None:
        ran &= np.nansum(tokens, axis=0) > 0
    for i in np.flatnonzero(~ran).tolist():
        yield Row(layers[i], "never ran: the model does not call it in training", "tokens", 0.0, last)


def _furthest(layers: Sequence[str], tail: Mapping[str, Array], last: int) -> Iterator[Row]:
    """One row for each layer, by its robust z-score over the layers in the statistic where that is largest."""
    found: dict[int, tuple[float, str, float]] = {}
    for name, values in tail.items():
        ran = np.isfinite(values)
        if not ran.any():
            continue
        # Most statistics are scales, and differ by factors.
        ratios = bool((values[ran] > 0).all())
        x = np.log(values, where=ran, out=np.full_like(values, np.nan)) if ratios else values
        middle = np.median(x[ran])
        spread = 1.4826 * np.median(np.abs(x[ran] - middle))
        least = 0.05 if ratios else 0.05 * np.abs(x[ran]).max() or 1.0  # layers that agree to 5% have none far out
        for i in np.flatnonzero(ran).tolist():
            z = abs(x[i] - middle) / max(spread, least)
            usual = float(np.exp(middle) if ratios else middle)
            found[i] = max(found.get(i, (-1.0, "", 0.0)), (z, name, usual))
    for i, (_, name, usual) in sorted(found.items(), key=lambda item: -item[1][0]):
        reason = f"among the furthest from the median layer's {number(usual)}; for information, not a fault"
        yield Row(layers[i], reason, name, float(tail[name][i]), last, fault=False)


def _median(values: Array) -> Array:
    """Over the steps, NaN for a layer that did not run."""
    out = np.full(values.shape[1], np.nan)
    ran = ~np.isnan(values).all(axis=0)
    out[ran] = np.nanmedian(values[:, ran], axis=0)
    return out


def format_table(rows: Sequence[Row], *, steps: int, most: int = 8) -> str:
    """Lay the rows out as plain text of at most 100 columns.

    Args:
        rows: from `layers_worth_a_look`.
        steps: how many the run had.
        most: rows shown; of the others only the number is said. Default: 8.

    Example:
        >>> print(format_table([Row("encoder.norm", "amax jumped", "amax", 5120.0, 204)], steps=1000))
        stabnorm: 1 layer worth a look after 1,000 steps
        layer                                           statistic                  value        step
        encoder.norm                                    amax                       5,120         204
            amax jumped
    """
    lines = [_verdict(rows, steps)]
    if rows:
        lines.append(_line("layer", "statistic", "value", "step"))
    names = shorten([row.layer for row in rows], 46)
    for row, name in list(zip(rows, names, strict=True))[:most]:
        lines.append(_line(name, row.statistic, number(row.value), f"{row.step:,}"))
        lines += textwrap.wrap(row.reason, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    if len(rows) > most:
        lines.append(f"and {len(rows) - most} more")
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row], *, most: int = 8) -> str:
    """Lay the rows out as Markdown.

    Args:
        rows: from `layers_worth_a_look`.
        most: rows shown; of the others only the number is said. Default: 8.
    """
    lines = ["| layer | statistic | value | step | reason |", "|---|---|---:|---:|---|"]
    for row in rows[:most]:
        cells = (f"`{row.layer}`", f"`{row.statistic}`", number(row.value), f"{row.step:,}", row.reason)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    more = f"\n\nand {len(rows) - most} more" if len(rows) > most else ""
    return f"{_verdict(rows)}\n\n" + "\n".join(lines) + more if rows else _verdict(rows)


def _verdict(rows: Sequence[Row], steps: int | None = None) -> str:
    faults = sum(row.fault for row in rows)
    if not faults:
        return "stabnorm: nothing alarming was seen" + (f" in {steps:,} steps" if steps is not None else "")
    after = f" after {steps:,} steps" if steps is not None else ""
    return f"stabnorm: {faults} layer{'s'[: faults > 1]} worth a look{after}"


def _line(layer: str, statistic: str, value: str, step: str) -> str:
    return f"{layer:<46}  {statistic:<22} {value:>9}  {step:>10}"
