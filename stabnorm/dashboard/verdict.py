"""What came of a run, in plain sentences: its state, when and where it left its own past, and what to do.

Alerts are read from the record, and no other rule raises one here. A verdict adds what a reader asks next: which layers
moved together, by which factor, and how long the loss took to follow.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stabnorm.dashboard.definitions import definition
from stabnorm.dashboard.runs import Run
from stabnorm.dashboard.text import number
from stabnorm.monitor.baseline import ARMED, BOUND, Floats
from stabnorm.monitor.record import Event
from stabnorm.remedies.symptoms import remedies_for

TOGETHER = 32  # steps within which layers move together
SAME = 100  # steps: an alert that follows another one as closely belongs to the same onset
_USUAL_LOSS = 50  # steps before an onset, whose median loss is the usual one
_SCALE = ("token_std_mean", "amax")  # of which it is told who moved, where an alert is about something else
_MOST = 0.75  # of the layers: as many that move at once have one cause


class Onset(NamedTuple):
    """Alerts that belong together.

    Attributes:
        step: of the first alert.
        last_step: of the last alert.
        kind: "past" if a layer left its own past, "bound" if a value crossed a fixed bound, "nonfinite" for NaN and
            infinity.
        layer: the layer of the first alert.
        statistic: its statistic.
        value: its value.
        usual: what was usual there; NaN if unknown.
        moved: the layers that moved within 32 steps, in depth order.
        factors: how far the moved layers were off their usual value then, smallest and largest; NaN if unknown.
        now: the same at the end of the run.
        lead: steps from the first alert until the loss had doubled; negative if it had doubled before, None if never.
        alerts: the alerts themselves, as they were recorded.
        sentence: what happened.
        advice: where to look.
        remedy: what to try.
    """

    step: int
    last_step: int
    kind: str
    layer: str
    statistic: str
    value: float
    usual: float
    moved: tuple[str, ...]
    factors: tuple[float, float]
    now: tuple[float, float]
    lead: int | None
    alerts: tuple[Mapping[str, Any], ...]
    sentence: str
    advice: str
    remedy: str


class Verdict(NamedTuple):
    """What came of a run.

    Attributes:
        state: "not finite", "unstable", "learning" (no comparison with the past yet), "switched" or "healthy".
        severity: 3 for what is not finite, 2 for unstable, 1 for learning, 0 otherwise.
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
    onsets = tuple(_onset(run, group) for group in _groups([e for e in run.events if e.kind == "alert"]))
    if not len(steps):
        return Verdict("learning", 1, "no step was recorded yet", (), onsets)
    lines = _said_of_loss(run)
    switched = switch_counts(run)
    watched = f"{len(steps):,} steps were watched, up to step {steps[-1]:,}."
    first = next((onset for onset in onsets if onset.kind == "nonfinite"), onsets[0] if onsets else None)
    if first is not None:
        state, severity = ("not finite", 3) if first.kind == "nonfinite" else ("unstable", 2)
        others = [f"{len(onsets)} onsets in all."] if len(onsets) > 1 else []
        if first is not onsets[0]:
            others.insert(0, f"It began at step {onsets[0].step:,}: {onsets[0].sentence}")
        told = (first.sentence, *others, *lines, *switched)
        return Verdict(state, severity, _title(run, first), told, onsets)
    if any("not finite" in line for line in lines):
        return Verdict("not finite", 3, "the loss is not finite", (*lines, *switched), onsets)
    if len(steps) < ARMED:
        text = (
            f"{len(steps)} of {ARMED} steps: layers are compared with their own past from step {steps[0] + ARMED} on. "
            "Until then only fixed bounds and non-finite values are watched."
        )
        return Verdict("learning", 1, "nothing alarming yet; it still learns what is usual", (text, *lines), onsets)
    armed = f"Layers are compared with their own past from step {steps[0] + ARMED:,} on."
    if switched:
        return Verdict("switched", 0, switched[0].rstrip("."), (*switched[1:], watched, *lines), onsets)
    return Verdict("healthy", 0, "nothing left its own past", (f"{watched} {armed}", *lines), onsets)


def _groups(alerts: Sequence[Event]) -> list[list[Event]]:
    groups: list[list[Event]] = []
    for alert in alerts:
        last = groups[-1][-1] if groups else None
        if last and alert.step - last.step <= SAME and _not_finite(alert) == _not_finite(last):
            groups[-1].append(alert)
        else:
            groups.append([alert])
    return groups


def _not_finite(alert: Event) -> bool:
    return bool(alert.data["statistic"] == "nonfinite")


def _onset(run: Run, group: Sequence[Event]) -> Onset:
    alert = group[0]
    statistic, layer = str(alert.data["statistic"]), str(alert.data["layer"])
    kind = "nonfinite" if _not_finite(alert) else "bound" if definition(statistic).floor is None else "past"
    companion = next((c for c in run.companions() if layer in run.rows(c).layers), "")
    names = run.statistics(companion)
    told = statistic if statistic in names and kind == "past" else next((n for n in _SCALE if n in names), "")
    moved, usual, factors, now = _who_moved(run, told, companion, group[0].step, layer)
    lead = _lead(run, group[0].step)
    value = float(alert.data["value"])
    onset = Onset(
        group[0].step, group[-1].step, kind, layer, statistic, value, usual if told == statistic else float("nan"),
        moved, factors, now, lead, tuple(e.data for e in group), "", "", "",
    )  # fmt: skip
    sentence, advice, remedy = _words(run, onset, run.rows(companion).layers, told)
    return onset._replace(sentence=sentence, advice=advice, remedy=remedy)


def _who_moved(
    run: Run, statistic: str, companion: str, step: int, layer: str
) -> tuple[tuple[str, ...], float, tuple[float, float], tuple[float, float]]:
    """Return the layers that moved together, the usual value of one layer, and the factors then and at the end."""
    nothing = float("nan"), float("nan")
    rows = run.rows(companion)
    values = run.series(statistic, companion) if statistic else None
    if values is None or not len(values) or layer not in rows.layers:
        return (layer,), float("nan"), nothing, nothing
    first, end = np.searchsorted(rows.steps, (step, step + TOGETHER))
    first = min(int(first), len(values) - 1)
    end = max(int(end), first + 1)
    baseline = run.baseline(statistic, companion)
    usual = baseline.usual(np.array([first]))[0]
    scale = baseline.scale(np.array([first]))[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = values[first:end] / usual
        off = np.abs(np.log(ratios)) / scale
        at_end = _median(values[-10:]) / usual
    held = np.minimum(off[1:], off[:-1]) if len(off) > 1 else off  # one step alone does not count
    column = rows.layers.index(layer)
    far = (np.nan_to_num(held) > BOUND).any(0)
    far[column] = True
    factors = ratios[-1][far]
    moved = tuple(name for name, is_far in zip(rows.layers, far, strict=True) if is_far)
    return moved, float(usual[column]), _range(factors), _range(at_end[far])


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
    if onset.kind == "nonfinite":
        return f"NaN or infinity at {onset.layer} at {at}"
    if onset.kind == "bound" and len(onset.moved) == 1:
        return f"{onset.layer} crossed a bound at {at}"
    return f"{_who(run, onset)} left {'its' if len(onset.moved) == 1 else 'their'} own past at {at}"


def _who(run: Run, onset: Onset) -> str:
    layers = next((rows for c in run.companions() if onset.layer in (rows := run.rows(c).layers)), onset.moved)
    if len(onset.moved) == 1:
        return onset.layer
    if len(onset.moved) == len(layers):
        return f"all {len(layers)} layers"
    return f"{len(onset.moved)} of {len(layers)} layers"


def times(low: float, high: float) -> str:
    """Say a factor, or a range of factors.

    Example:
        >>> times(1.24, 1.4), times(209.1, 209.2)
        ('×1.24 to ×1.4', '×209')
    """
    low_text, high_text = number(low), number(high)
    return f"×{high_text}" if low_text == high_text else f"×{low_text} to ×{high_text}"


def _words(run: Run, onset: Onset, layers: Sequence[str], told: str) -> tuple[str, str, str]:
    """Return what happened, where to look, and what to try."""
    plain = definition(onset.statistic).plain
    loss = _said_of_lead(onset)
    if onset.kind == "nonfinite":
        sentence = f"The input of {onset.layer} held a NaN or an infinity at step {onset.step:,}."
        advice = (
            f"{onset.layer} is the first layer in depth order that saw it: look at what feeds it, and at the batch of "
            f"step {onset.step:,}."
        )
        remedy = (
            "Check that batch for NaN. If it is clean, train this part in bfloat16 or float32, or clip the gradient "
            "(Trainer(gradient_clip_val=1.0)). Go on from a checkpoint before this step."
        )
        return sentence, advice, remedy
    moved = f" {_followed(onset, layers)}" if len(onset.moved) > 1 else ""
    now = f" At the end it is {times(*onset.now)}." if np.isfinite(onset.now[0]) else ""
    if onset.kind == "bound":
        sentence = f"The {plain} of {onset.layer} was {number(onset.value)}.{moved}{loss}"
        advice = definition(onset.statistic).advice
        return sentence, advice[:1].upper() + advice[1:] + ".", _published_remedy(onset) or _remedy(onset, layers)
    factor = onset.value / onset.usual
    sentence = (
        f"The {plain} of {onset.layer} was {number(onset.value)}, {times(factor, factor)} its usual "
        f"{number(onset.usual)}.{moved}{now}{loss}"
    )
    return sentence, _advice(onset, layers), _remedy(onset, layers)


def _followed(onset: Onset, layers: Sequence[str]) -> str:
    count = f"{len(onset.moved)} of {len(layers)} layers"
    far = f" ({times(*onset.factors)})" if np.isfinite(onset.factors[0]) else ""
    return f"Within {TOGETHER} steps {count} moved{far}."


def _said_of_lead(onset: Onset) -> str:
    if onset.lead is None:
        return " The loss did not double."
    if onset.lead > 0:
        return f" The loss doubled {onset.lead} steps later."
    return f" The loss had doubled {-onset.lead} steps before." if onset.lead else " The loss doubled at this step."


def _is_global(onset: Onset, layers: Sequence[str]) -> bool:
    return len(layers) > 2 and len(onset.moved) >= _MOST * len(layers)


def _advice(onset: Onset, layers: Sequence[str]) -> str:
    first = list(layers).index(onset.moved[0]) if onset.moved[0] in layers else 0
    if _is_global(onset, layers):
        return (
            "Nearly all layers moved at once, so the cause is global and not one layer: look at the learning rate, the "
            f"weight decay, and what changed just before step {onset.step:,}."
        )
    if first == 0:
        return f"It begins at the first layer, {onset.moved[0]}: look at the inputs and the embedding before it."
    where = f"between {layers[first - 1]} and {onset.moved[0]}"
    if len(onset.moved) > 1:
        return f"The layers before {onset.moved[0]} stayed calm, so the cause lies {where}: look at the weights there."
    return f"Only {onset.layer} moved, so the cause lies {where}: look at the weights there."


def _published_remedy(onset: Onset) -> str:
    """Name what `stabnorm.remedies` has for this statistic; "" where it has nothing."""
    remedies = remedies_for(onset.statistic)
    if not remedies:
        return ""
    first, *others = remedies
    more = f" Others are {', '.join(other.path for other in others)}." if others else ""
    return f"{first.path} {first.action}.{more} See stabnorm remedies {onset.statistic}."


def _remedy(onset: Onset, layers: Sequence[str]) -> str:
    back = f"Go on from a checkpoint before step {onset.step:,}"
    if _is_global(onset, layers):
        return f'{back} with half the learning rate or a longer warm-up. companions=["weights"] shows what grows.'
    return f'{back} and clip the gradient (Trainer(gradient_clip_val=1.0)). companions=["weights"] shows what grows.'


def _said_of_loss(run: Run) -> list[str]:
    losses = run.series("loss")
    if losses is None:
        return []
    steps = run.rows().steps
    bad = np.flatnonzero(np.isinf(losses))
    known = np.flatnonzero(~np.isnan(losses))
    if known.size and known[-1] + 1 < len(losses):  # NaN also stands for a loss that was never given
        bad = np.append(bad, known[-1] + 1)
    return [f"The loss is not finite from step {steps[bad.min()]:,} on."] if bad.size else []


def switch_counts(run: Run) -> list[str]:
    """Return sentences on the switch from LayerNorm to BatchNorm and on the fold; none if there was no switch."""
    lam = run.series("lam")
    folds = [event.data for event in run.events if event.kind == "fold_report"]
    lines = []
    if lam is not None and len(lam):
        steps = run.rows().steps
        known = ~np.isnan(lam)
        seen = known.any(0)
        newest = len(lam) - 1 - known[::-1].argmax(0)
        last = np.where(seen, lam[newest, np.arange(lam.shape[1])], np.nan)
        done, total = int((last == 0).sum()), int(seen.sum())
        began = np.flatnonzero((lam < 1).any(1))
        if total:
            lines.append(f"{done} of {total} norms are switched to BatchNorm.")
        if began.size:
            ended = np.flatnonzero(np.nanmax(np.where(np.isnan(lam), -1, lam), axis=1) == 0)
            end = (
                f"at 0 from step {steps[ended[0]]:,}" if ended.size else f"{number(float(np.nanmax(last)))} at most now"
            )
            lines.append(f"The share of LayerNorm (lam) falls from step {steps[began[0]]:,}, and is {end}.")
    for fold in folds[-1:]:
        kept = [norm for norm in fold["norms"] if norm["status"] == "kept"]
        lines.append(
            f"{len(fold['norms']) - len(kept)} of {len(fold['norms'])} norms are folded into their neighbours."
        )
    return lines
