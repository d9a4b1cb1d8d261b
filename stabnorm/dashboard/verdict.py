"""What came of a run, in plain sentences: its state, when and where it left its usual range, and what to do.

Alerts and onsets are read from the record, and no other rule makes one here: `stabnorm.monitor.onsets` says what
belongs together and what to do. A verdict adds what a reader asks next: by which factor the layers moved, and how long
the loss took to follow.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stabnorm.dashboard.definitions import definition
from stabnorm.dashboard.runs import Run
from stabnorm.dashboard.text import number, shorten
from stabnorm.monitor import onsets as monitored
from stabnorm.monitor.alerts import TRAINING, Alert, Departure
from stabnorm.monitor.baseline import ARMED, BOUND, Floats
from stabnorm.monitor.onsets import TOGETHER
from stabnorm.monitor.record import Event
from stabnorm.monitor.words import plain_name, times
from stabnorm.remedies.symptoms import remedies_for

_USUAL_LOSS = 50  # steps before an onset, whose median loss is the usual one
_LONG = 50  # letters of a layer's name in a sentence; its middle is left out where it is longer
_SCALE = ("token_std_mean", "amax")  # of which it is told who moved, where an alert is about something else


class Onset(NamedTuple):
    """Alerts that belong together.

    Attributes:
        step: of the first alert.
        last_step: of the last alert.
        kind: "past" if a layer left its usual range, "bound" or "start" if a value crossed a fixed bound, "nonfinite"
            for NaN and infinity.
        scope: "one layer", "from here on", "everywhere" or "training", see `stabnorm.Onset`.
        layer: the layer where it began.
        statistic: its statistic.
        value: its value.
        usual: what was usual there; NaN if unknown.
        moved: the layers that moved within 32 steps, in depth order.
        factors: how far the moved layers were off their usual value then, smallest and largest; NaN if unknown.
        now: the same at the end of the run.
        lead: steps from the first alert until the loss had doubled; negative if it had doubled before, None if never.
        alerts: the alerts themselves, as they were recorded.
        aftermath: how far the layers went, and what the loss did, a sentence each.
        sentence: what happened.
        advice: where to look.
        remedy: what to try.
    """

    step: int
    last_step: int
    kind: str
    scope: str
    layer: str
    statistic: str
    value: float
    usual: float
    moved: tuple[str, ...]
    factors: tuple[float, float]
    now: tuple[float, float]
    lead: int | None
    alerts: tuple[Mapping[str, Any], ...]
    aftermath: tuple[str, ...]
    sentence: str
    advice: str
    remedy: str


class Verdict(NamedTuple):
    """What came of a run.

    Attributes:
        state: "not finite", "unstable", "too early" (nothing is compared with the past yet), "switching", "switched" or
            "healthy".
        severity: 3 for what is not finite, 2 for unstable, 1 for too early, 0 otherwise.
        title: one line.
        lines: what else a reader should know, a sentence each.
        onsets: in the order of their steps.
    """

    state: str
    severity: int
    title: str
    lines: tuple[str, ...]
    onsets: tuple[Onset, ...]


def verdict(run: Run) -> Verdict:
    """Judge a run by what its record holds so far."""
    steps = run.rows().steps
    onsets = tuple(_onset(run, onset) for onset in _recorded(run) or _of_alerts(run))
    if not len(steps):
        return Verdict("too early", 1, "no step was recorded yet", (), onsets)
    lines = _said_of_loss(run)
    switched = switch_counts(run)
    watched = f"{len(steps):,} steps were watched, up to step {steps[-1]:,}."
    first = next((onset for onset in onsets if onset.kind == "nonfinite"), onsets[0] if onsets else None)
    if first is not None:
        state, severity = ("not finite", 3) if first.kind == "nonfinite" else ("unstable", 2)
        others = [f"{len(onsets)} onsets in all."] if len(onsets) > 1 else []
        if first is not onsets[0]:
            others.insert(0, f"It began at step {onsets[0].step:,}: {_title(run, onsets[0])}.")
        return Verdict(state, severity, _title(run, first), (*first.aftermath, *others, *lines, *switched), onsets)
    if any("not finite" in line for line in lines):
        return Verdict("not finite", 3, "the loss is not finite", (*lines, *switched), onsets)
    if len(steps) < ARMED:
        text = (
            f"{len(steps)} of {ARMED} steps: layers are compared with their usual range from step {steps[0] + ARMED} "
            "on. Until then only fixed bounds, NaN and infinity raise alerts."
        )
        return Verdict("too early", 1, "nothing alarming in the first steps", (text, *lines), onsets)
    compared = f"Layers are compared with their usual range from step {steps[0] + ARMED:,} on."
    if switched:
        state = "switching" if _switches(run) else "switched"
        return Verdict(state, 0, switched[0].rstrip("."), (*switched[1:], watched, *lines), onsets)
    title = "every layer stayed in its usual range"
    return Verdict("healthy", 0, title, (f"{watched} {compared}", *lines), onsets)


def _recorded(run: Run) -> list[monitored.Onset]:
    """Return the onsets as the monitor wrote them, each in its last version."""
    newest = {event.step: event.data for event in run.events if event.kind == "onset"}
    return [monitored.Onset.of_dict(data) for _, data in sorted(newest.items())]


def _of_alerts(run: Run) -> list[monitored.Onset]:
    """Group the alerts of a record that has no onsets, by the monitor's rule; who moved is read from the series."""
    follower = monitored.OnsetFollower()
    layers, steps = run.rows()
    for alert in map(_alert, (event for event in run.events if event.kind == "alert")):
        departed = _departures(run, alert) if alert.kind == "past" else []
        follower.add([alert], departed, monitored.Watched(layers, steps=len(steps)))
    return follower.onsets


def _alert(event: Event) -> Alert:
    """Return an alert of a record, also of an older one, which does not tell its kind."""
    names = {field.name for field in dataclasses.fields(Alert)}
    data: dict[str, Any] = {name: value for name, value in event.data.items() if name in names}
    statistic = str(data["statistic"])
    kind = "nonfinite" if statistic == "nonfinite" else "bound" if definition(statistic).floor is None else "past"
    data |= {name: float(data[name]) for name in ("value", "threshold", "usual", "score") if name in data}
    return Alert(**{"kind": kind, "threshold": float("nan"), "reason": "", **data})


def _told(run: Run, statistic: str, companion: str) -> str:
    """Return the statistic of which it is told who moved; "" if the record has none."""
    names = run.statistics(companion)
    return statistic if statistic in names else next((name for name in _SCALE if name in names), "")


def _companion(run: Run, layer: str) -> str:
    return next((companion for companion in run.companions() if layer in run.rows(companion).layers), "")


def _names(run: Run, layer: str) -> tuple[str, ...]:
    """Return the names that may stand in a sentence about a layer: of the norms, and of its companion."""
    return tuple(dict.fromkeys((layer, *run.rows(_companion(run, layer)).layers, *run.rows().layers)))


def _departures(run: Run, alert: Alert) -> list[Departure]:
    companion = _companion(run, alert.layer)
    told = _told(run, alert.statistic, companion)
    moved, values, usual, scores = _who_moved(run, told, companion, alert.step, alert.layer)
    departures = []
    for column, name in enumerate(run.rows(companion).layers):
        if name in moved:
            value, before, score = (float(of[column]) for of in (values, usual, scores))
            departures.append(Departure(alert.step, name, told, value, before, score))
    return departures


def _onset(run: Run, onset: monitored.Onset) -> Onset:
    companion = _companion(run, onset.layer)
    told = _told(run, onset.statistic if onset.kind == "past" else "", companion)
    moved = onset.moved or (onset.layer,)
    factors, now = _factors(run, told, companion, onset.step, moved)
    lead = _lead(run, onset.step)
    alerts = tuple(
        event.data for event in run.events if event.kind == "alert" and onset.step <= event.step <= onset.last_step
        and (event.data["statistic"] == "nonfinite") == (onset.kind == "nonfinite")
    )  # fmt: skip
    names = _names(run, onset.layer)
    aftermath = () if onset.kind == "nonfinite" else (*_said_of_factors(onset, told, factors, now), _said_of_lead(lead))
    sentence = with_short_names(" ".join((onset.sentence, *aftermath)), names)
    advice = with_short_names(" ".join(filter(None, (onset.advice, _said_of_rows(run, onset)))), names)
    named = "" if onset.value < onset.usual else _named_remedies(onset.statistic)  # they are against growth
    remedy = " ".join(filter(None, (onset.remedy, named)))
    return Onset(
        onset.step, onset.last_step, onset.kind, onset.scope, onset.layer, onset.statistic, onset.value, onset.usual,
        moved, factors, now, lead, alerts, aftermath, sentence, advice, remedy,
    )  # fmt: skip


def _said_of_rows(run: Run, onset: monitored.Onset) -> str:
    """Return what the recorder said of the rows of a batch of this onset."""
    of_onset = [e.data for e in run.events if e.kind == "rows" and onset.step <= e.step <= onset.last_step]
    return str(of_onset[-1]["sentence"]) if of_onset else ""


def _who_moved(
    run: Run, statistic: str, companion: str, step: int, layer: str
) -> tuple[tuple[str, ...], Floats, Floats, Floats]:
    """Return the layers that moved together, and of all layers the values then, what was usual, and the scores."""
    rows = run.rows(companion)
    values = run.series(statistic, companion) if statistic else None
    if values is None or not len(values) or layer not in rows.layers:
        nothing = np.full(len(rows.layers), np.nan)
        return (), nothing, nothing, nothing
    first, end = _around(run, companion, step)
    baseline = run.baseline(statistic, companion)
    usual = baseline.usual(np.array([first]))[0]
    off: Floats = np.abs(baseline.scores(values[first:end], np.full(end - first, first)))
    held = np.minimum(off[1:], off[:-1]) if len(off) > 1 else off  # one step alone does not count
    far = np.any(np.nan_to_num(held) > BOUND, axis=0)
    moved = tuple(name for name, is_far in zip(rows.layers, far, strict=True) if is_far)
    return moved, values[end - 1], usual, np.nan_to_num(held).max(0)


def _around(run: Run, companion: str, step: int) -> tuple[int, int]:
    """Return the rows in which layers move together after a step."""
    steps = run.rows(companion).steps
    first, end = np.searchsorted(steps, (step, step + TOGETHER))
    first = min(int(first), len(steps) - 1)
    return first, max(int(end), first + 1)


def _factors(
    run: Run, statistic: str, companion: str, step: int, moved: Sequence[str]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return how far the moved layers were off their usual value, smallest and largest: then, and at the end."""
    rows = run.rows(companion)
    values = run.series(statistic, companion) if statistic else None
    columns = [rows.layers.index(name) for name in moved if name in rows.layers]
    if values is None or not len(values) or not columns:
        return (float("nan"),) * 2, (float("nan"),) * 2
    first, end = _around(run, companion, step)
    usual = run.baseline(statistic, companion).usual(np.array([first]))[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        then, at_end = values[end - 1] / usual, _median(values[-10:]) / usual
    return _range(then[columns]), _range(at_end[columns])


def _median(values: Floats) -> Floats:
    out = np.full(values.shape[1], np.nan)
    ran = ~np.isnan(values).all(0)
    out[ran] = np.nanmedian(values[:, ran], axis=0)
    return out


def _range(values: Floats) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (float("nan"), float("nan"))


def _lead(run: Run, step: int) -> int | None:
    losses = run.series("loss")
    steps = run.rows().steps
    if losses is None or not len(losses):
        return None
    doubled = loss_doubled(losses, int(np.searchsorted(steps, step)))
    return None if doubled is None else int(steps[doubled]) - step


def loss_doubled(losses: Floats, at: int) -> int | None:
    """Return the first row, from shortly before an onset on, at which the mean of five losses is twice the usual loss.

    Args:
        losses: the loss of each row.
        at: the onset's row. The usual loss is the median of the 50 rows before it.

    Returns:
        The row; None if the loss never doubles, or if no finite loss came before. A loss that is NaN counts as well.

    >>> loss_doubled(np.array([1.0] * 60 + [3.0] * 10), 60)
    62
    """
    before = losses[max(0, at - _USUAL_LOSS) : at]
    before = before[np.isfinite(before)]
    if not before.size:
        return None
    begin = max(0, at - _USUAL_LOSS // 2)
    smooth = np.convolve(losses, np.ones(5) / 5)[: len(losses)]
    late = np.flatnonzero(~(smooth[begin:] <= 2 * np.median(before)))
    return begin + int(late[0]) if late.size else None


def _title(run: Run, onset: Onset) -> str:
    at = f"step {onset.step:,}"
    layer = with_short_names(onset.layer, _names(run, onset.layer))
    if onset.kind == "nonfinite":
        return f"NaN or infinity in {'the loss' if onset.layer == TRAINING else layer} at {at}"
    if onset.kind == "bound" and len(onset.moved) == 1:
        return f"{layer} crossed a fixed bound at {at}"
    who, several = _who(run, onset, layer)
    return f"{who} left {'their' if several else 'its'} usual range at {at}"


def _who(run: Run, onset: Onset, layer: str) -> tuple[str, bool]:
    """Return which layers moved, in words, and whether there are several."""
    count = len(run.rows().layers)
    others = len(set(onset.moved) - {onset.layer})
    if len(onset.moved) == count > 1:
        return f"all {count} layers", True
    if others and (onset.scope == "everywhere" or onset.layer == TRAINING):
        return f"{len(onset.moved)} of {count} layers", True
    if others:
        return f"{layer} and {others} more layer{'s'[: others > 1]}", True
    return f"the {plain_name(onset.statistic)}" if onset.layer == TRAINING else layer, False


def _said_of_factors(
    onset: monitored.Onset, told: str, factors: tuple[float, float], now: tuple[float, float]
) -> list[str]:
    """Say how far the layers that moved were off their usual value."""
    count = len(onset.moved)
    if not np.isfinite(factors[0]) or (count < 2 and onset.kind != "past"):
        return []
    whose = f"{'Their' if count > 1 else 'Its'} {plain_name(told)}"
    at_end = f", and {times(*now)} at the end" if np.isfinite(now[0]) else ""
    return [f"{whose} was {times(*factors)} its usual value within {TOGETHER} steps{at_end}."]


def _said_of_lead(lead: int | None) -> str:
    if lead is None:
        return "The loss did not double."
    steps = f"{abs(lead):,} step{'s'[: abs(lead) > 1]}"
    if lead > 0:
        return f"The loss doubled {steps} later."
    return f"The loss had doubled {steps} before." if lead else "The loss doubled at this step."


def with_short_names(text: str, names: Sequence[str]) -> str:
    """Return a text in which long names are without what all of them begin with, or cut in their middle.

    >>> with_short_names(f"Look at {'a' * 50}.{'b' * 50}.", [f"{'a' * 50}.{'b' * 50}"])
    'Look at aaaaaaaaaaaaaaaaaaaaaaaaa…bbbbbbbbbbbbbbbbbbbbbbbb.'
    """
    long = sorted((name for name in names if len(name) > _LONG), key=len, reverse=True)
    for name, short in zip(long, shorten(long, _LONG), strict=True):
        text = text.replace(name, short)
    return text


def _named_remedies(statistic: str) -> str:
    """Name what `stabnorm.remedies` has for this statistic; "" where it has nothing."""
    remedies = remedies_for(statistic)
    if not remedies:
        return ""
    first, *others = remedies
    more = f" Others are {', '.join(other.path for other in others)}." if others else ""
    return f"{first.path} {first.action}.{more} See stabnorm remedies {statistic}."


def _said_of_loss(run: Run) -> list[str]:
    losses = run.series("loss")
    if losses is None:
        return []
    lost = lost_from(losses)
    bad = np.append(np.flatnonzero(np.isinf(losses)), [] if lost is None else [lost]).astype(int)
    return [f"The loss is not finite from step {run.rows().steps[bad.min()]:,} on."] if bad.size else []


def lost_from(losses: Floats) -> int | None:
    """Return the row from which on the loss is NaN until the end, None if it is not.

    NaN before that stands for a loss that was not given at a step.

    >>> lost_from(np.array([2.0, np.nan, 1.0, np.nan, np.nan]))
    3
    """
    known = np.flatnonzero(~np.isnan(losses))
    return int(known[-1]) + 1 if known.size and known[-1] + 1 < len(losses) else None


def _last_lam(lam: Floats) -> Floats:
    """Return the last known share of LayerNorm of each norm, NaN where there is none."""
    known = ~np.isnan(lam)
    newest = len(lam) - 1 - known[::-1].argmax(0)
    return np.where(known.any(0), lam[newest, np.arange(lam.shape[1])], np.nan)


def _switches(run: Run) -> bool:
    """Whether some norm is on its way from LayerNorm to BatchNorm."""
    lam = run.series("lam")
    last = np.empty(0) if lam is None or not len(lam) else _last_lam(lam)
    return bool(((last > 0) & (last < 1)).any())


def switch_counts(run: Run) -> list[str]:
    """Return sentences on the switch from LayerNorm to BatchNorm and on the fold; none if there was no switch."""
    lam = run.series("lam")
    folds = [event.data for event in run.events if event.kind == "fold_report"]
    lines = []
    if lam is not None and len(lam):
        steps = run.rows().steps
        last = _last_lam(lam)
        done, total = int((last == 0).sum()), int((~np.isnan(last)).sum())
        began = np.flatnonzero((lam < 1).any(1))
        if total:
            lines.append(f"{done} of {total} norms are switched to BatchNorm.")
        if began.size:
            ended = np.flatnonzero(np.nanmax(np.where(np.isnan(lam), -1, lam), axis=1) == 0)
            now = f"is at most {number(float(np.nanmax(last)))} now"
            end = f"was 0 from step {steps[ended[0]]:,} on" if ended.size else now
            lines.append(f"The share of LayerNorm (lam) fell from step {steps[began[0]]:,} on, and {end}.")
    for fold in folds[-1:]:
        kept = [norm for norm in fold["norms"] if norm["status"] == "kept"]
        lines.append(
            f"{len(fold['norms']) - len(kept)} of {len(fold['norms'])} norms are folded into their neighbours."
        )
    return lines
