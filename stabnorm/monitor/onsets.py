"""From alerts to onsets: which layers left their usual range together, where it began, and what a person should do.

A fault reaches many layers, and each of them may raise alerts. What belongs together is one `Onset`. It tells one of
three stories. *One layer* moved alone. Or it moved *from here on*: a fault in one place reaches the layers behind it,
so the first one in depth order is named; a fault of the backward pass reaches the layers before it, so for statistics
of the gradient it is the last one. Or they moved *everywhere* at once, which has a global cause, and no layer is named.
A layer is named only if its own score crossed the bound.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from stabnorm.monitor.alerts import TRAINING, Alert, Departure, Kind
from stabnorm.monitor.baseline import ARMED, BOUND
from stabnorm.monitor.record import Block
from stabnorm.monitor.words import global_remedy, measured, number, plain_name, remedy_of, rests_on

Scope = Literal["one layer", "from here on", "everywhere", "training"]

SAME = 100  # steps: an alert that follows another one as closely belongs to the same onset
TOGETHER = 32  # steps within which layers move together
_AT_ONCE = 2  # steps within which the loss shows what is wrong with its targets
MOST = 0.75  # share of the layers: if as many move at once, the cause is global


@dataclass(frozen=True)
class Onset:
    """Alerts that belong together, and what is known of their cause.

    Attributes:
        step: step of the first alert.
        last_step: step of the last alert so far.
        kind: kind of the first alert: "past", "bound" or "nonfinite".
        scope: "one layer", "from here on", "everywhere", or "training" if only the loss or gradients moved at first.
        layer: the layer where it began; if the scope is "everywhere" or "training", this is the row of the first
            alert, and does not mean that the cause is there.
        statistic: the statistic of the first alert.
        value: its value.
        usual: what was usual before; NaN if unknown.
        score: its score, in robust standard deviations; NaN if the alert needs no past.
        moved: the layers whose own score crossed the bound within 32 steps, in depth order. Never empty if `kind` is
            "past" and a layer moved.
        layers: the number of layers that are watched.
        channels: the channels of `layer` with the largest inputs at that step, largest first; () if unknown.
        cause: for the scope "everywhere": "learning rate", "weight decay", "precision", "data" or "" if none of these
            is known to have moved; a reason that was announced counts as the cause, too.
        sentence: what happened, where, and since when.
        advice: what to look at.
        remedy: what to try.
        rests_on: what the verdict rests on, such as "240 steps watched; ...".
    """

    step: int
    last_step: int
    kind: Kind
    scope: Scope
    layer: str
    statistic: str
    value: float
    usual: float = math.nan
    score: float = math.nan
    moved: tuple[str, ...] = ()
    layers: int = 0
    channels: tuple[int, ...] = ()
    cause: str = ""
    sentence: str = ""
    advice: str = ""
    remedy: str = ""
    rests_on: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.sentence, self.advice, self.remedy, self.rests_on)))

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers, for records and checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> "Onset":
        """Return the onset that `as_dict` described, also after a way through JSON."""
        names = {field.name for field in dataclasses.fields(cls)}
        known: dict[str, Any] = {name: value for name, value in data.items() if name in names}
        for name in ("value", "usual", "score"):
            known[name] = float(known.get(name, math.nan))
        for name in ("moved", "channels"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)


class Settings:
    """Remembers what was set in the last steps: learning rate, weight decay, loss scale, and what was announced."""

    NAMES = ("learning_rate", "weight_decay", "loss_scale")
    _RISE = 1.3  # within `TOGETHER` steps: a warm-up or a decay is slower where layers are compared with their past

    def __init__(self) -> None:
        self._steps = np.empty(0, np.int64)
        self._values = np.empty((0, len(self.NAMES)))
        self.announced: list[tuple[int, str]] = []

    def see(self, block: Block) -> None:
        """Take in the steps of a flush."""
        count = block.num_steps
        columns = [block.series.get(name, np.full(count, np.nan)) for name in self.NAMES]
        keep = 2 * SAME
        self._steps = np.r_[self._steps, block.first_step + np.arange(count)][-keep - count :]
        self._values = np.r_[self._values, np.stack(columns, 1)][-keep - count :]

    def cause(self, step: int) -> tuple[str, str]:
        """Return which setting moved shortly before a step, and a sentence about it; ("", "") if none did."""
        for at, reason in reversed(self.announced):
            if 0 <= step - at <= SAME:
                return reason, f"It was announced at step {at:,}: {reason}."
        near = (self._steps <= step) & (self._steps >= step - TOGETHER)
        for name, values in zip(self.NAMES, self._values[near].T, strict=True):
            known = values[np.isfinite(values)]
            if not known.size:
                continue
            moved = f"from {number(float(known[0]))} to {number(float(known[-1]))} in the {TOGETHER} steps before"
            if name == "loss_scale" and known.min() < known[0]:
                return "precision", f"The loss scale fell {moved}, so numbers overflow: look at what overflows."
            largest = np.abs(known[:-1]).min(initial=np.inf)
            if name != "loss_scale" and (abs(known[-1]) > self._RISE * largest or known.min() < 0 < known.max()):
                word = plain_name(name)
                return word, f"The {word} went {moved}: look at its schedule."
        return "", ""

    @property
    def known(self) -> str:
        """The names of the settings that were given, in words."""
        seen: list[bool] = np.atleast_1d(np.isfinite(self._values).any(0)).tolist()
        return ", ".join(plain_name(name) for name, was in zip(self.NAMES, seen, strict=True) if was)


class Watched(NamedTuple):
    """What is watched, and for how long.

    Attributes:
        layers: the norms, in depth order.
        rows: of each companion the number of its rows.
        steps: the number of steps that the detector has seen.
    """

    layers: Sequence[str]
    rows: Mapping[str, int] = {}
    steps: int = 0


class OnsetFollower:
    """Groups alerts and departures into onsets while a training runs.

    >>> follower = OnsetFollower()
    >>> alert = Alert(400, "norm2", "token_std_mean", 3.0, 1.5, "", usual=1.0, score=9.0)
    >>> left = [Departure(400, name, "token_std_mean", 3.0, 1.0, 9.0) for name in ("norm2", "norm3")]
    >>> (onset,) = follower.add([alert], left, Watched(("norm0", "norm1", "norm2", "norm3"), steps=450))
    >>> onset.scope, onset.layer, onset.moved
    ('from here on', 'norm2', ('norm2', 'norm3'))
    """

    def __init__(self) -> None:
        self.onsets: list[Onset] = []
        self.settings = Settings()
        self._recent: list[Departure] = []
        self._first: Alert | None = None  # of the last onset
        self._channels: tuple[int, ...] = ()

    def add(
        self,
        alerts: Sequence[Alert],
        departures: Sequence[Departure],
        watched: Watched,
        channels: Callable[[Alert], tuple[int, ...]] = lambda alert: (),
    ) -> list[Onset]:
        """Take in the alerts and departures of a flush, and return the onsets that are new or that grew.

        Args:
            alerts: in any order.
            departures: in any order.
            watched: what is watched.
            channels: the worst channels at an alert. Default: unknown.
        """
        newest = max([*(alert.step for alert in alerts), *(d.step for d in departures)], default=0)
        told_by = {(departure.step, departure.layer) for departure in departures}
        fresh = list(departures) + [  # of another detector, and of a lasting departure, there are alerts only
            Departure(a.step, a.layer, a.statistic, a.value, a.usual, a.score, companion=a.companion)
            for a in alerts
            if a.kind == "past" and (a.step, a.layer) not in told_by
        ]
        self._recent = [d for d in self._recent if newest - d.step <= 2 * SAME] + fresh
        changed: dict[int, Onset] = {}
        for alert in sorted(alerts, key=lambda alert: alert.step):
            last = self.onsets[-1] if self.onsets else None
            same = last is not None and alert.step - last.last_step <= SAME
            if last is not None and same and (alert.kind == "nonfinite") == (last.kind == "nonfinite"):
                self.onsets[-1] = dataclasses.replace(last, last_step=alert.step)
            else:
                self._first, self._channels = alert, channels(alert)
                self.onsets.append(self._told(alert, alert.step, watched))
            changed[len(self.onsets) - 1] = self.onsets[-1]
        if self._first is not None and any(_near(departure, self._first) for departure in fresh):
            told = self._told(self._first, self.onsets[-1].last_step, watched)  # they tell more of the last onset
            if dataclasses.replace(told, rests_on=self.onsets[-1].rests_on) != self.onsets[-1]:
                self.onsets[-1] = changed[len(self.onsets) - 1] = told
        return list(changed.values())

    def _told(self, alert: Alert, last_step: int, watched: Watched) -> Onset:
        """Tell the story of an onset by what has departed so far."""
        near = [departure for departure in self._recent if _near(departure, alert)]
        moved = _earliest(d for d in near if not d.companion and d.layer != TRAINING)
        depth = {name: place for place, name in enumerate(watched.layers)}
        forward = {name: d for name, d in moved.items() if not d.gradient and name in depth}
        scope, layer = _place(alert, moved, forward, depth, near, watched)
        cause, why = self.settings.cause(alert.step)
        of_updates = alert.companion == "weights"  # of many matrices, chance decides which one crosses the bound first
        if cause and alert.kind == "past" and (of_updates or len(forward) >= MOST * len(watched.layers)):
            scope, layer = "everywhere", alert.layer  # the setting that moved explains all of them
        if scope not in ("everywhere", "training"):
            cause, why = "", ""
        onset = Onset(
            alert.step, last_step, alert.kind, scope, layer, alert.statistic, alert.value, alert.usual, alert.score,
            tuple(sorted(moved, key=lambda name: depth.get(name, len(depth)))), len(watched.layers), self._channels
            if layer == alert.layer else (), cause, rests_on=rests_on(watched.steps, ARMED),
        )  # fmt: skip
        bound = next((d.bound for d in near if (d.step, d.layer) == (alert.step, alert.layer)), BOUND)
        sentence, advice, remedy = _words(onset, alert, moved, watched.layers, why, self.settings.known, bound)
        return dataclasses.replace(onset, sentence=sentence, advice=advice, remedy=remedy)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the onsets so far; departures of the last steps are not kept."""
        return [onset.as_dict() for onset in self.onsets]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Continue after the given onsets."""
        self.onsets = [Onset.of_dict(data) for data in state]
        self._recent, self._first = [], None


def worst_channels(norms: Block, alert: Alert) -> tuple[int, ...]:
    """Return the channels of an alert's layer that had the largest inputs at its step; () if the block has none."""
    ids, row = norms.series.get("top_channel_ids"), alert.step - norms.first_step
    if ids is None or alert.layer not in norms.layers or not 0 <= row < norms.num_steps:
        return ()
    found = ids[row, norms.layers.index(alert.layer)]
    return tuple(int(channel) for channel in found if np.isfinite(channel))


def _near(departure: Departure, alert: Alert) -> bool:
    """Whether a departure is part of what an alert tells."""
    return -SAME // 10 <= departure.step - alert.step <= TOGETHER


def _earliest(departures: Any) -> dict[str, Departure]:
    """Return the earliest departure of each layer, forward statistics before those of the gradient."""
    earliest: dict[str, Departure] = {}
    for departure in sorted(departures, key=lambda d: (d.gradient, d.step)):
        earliest.setdefault(departure.layer, departure)
    return earliest


def _place(
    alert: Alert,
    moved: Mapping[str, Departure],
    forward: Mapping[str, Departure],
    depth: Mapping[str, int],
    near: Sequence[Departure],
    watched: Watched,
) -> tuple[Scope, str]:
    """Return the scope of an onset, and the layer where it began."""
    if alert.kind == "start":
        return "everywhere", alert.layer
    if alert.kind != "past":
        return ("from here on" if alert.kind == "nonfinite" else "one layer"), alert.layer
    for companion, rows in watched.rows.items():
        if rows > 2 and len({d.layer for d in near if d.companion == companion}) >= MOST * rows:
            return "everywhere", alert.layer
    if not moved:
        return ("training" if alert.layer == TRAINING else "one layer"), alert.layer
    if alert.companion and len(forward) < MOST * len(depth):
        return "one layer" if not forward else "from here on", alert.layer
    at_once = [d for d in near if abs(d.step - alert.step) <= _AT_ONCE]
    of_loss = any(d.layer == TRAINING and d.statistic == "loss" for d in at_once)
    if of_loss and not any(d in at_once for d in forward.values()):
        return "training", alert.layer  # no layer's input has moved when the loss and the gradients have
    if not forward:  # the backward pass carries a fault to the layers before it
        layer = alert.layer if alert.layer in moved else max(moved, key=lambda name: depth.get(name, -1))
        if len(moved) >= MOST * len(depth) and len(depth) > 2:
            return "everywhere", layer
        return ("one layer" if len(moved) == 1 else "from here on"), layer
    if len(depth) > 2 and len(forward) >= MOST * len(depth) and not _travels(forward, depth):
        return "everywhere", alert.layer
    layer = alert.layer if alert.layer in forward else min(forward, key=lambda name: (forward[name].step, depth[name]))
    return ("one layer" if len(forward) == 1 else "from here on"), _head(layer, forward, depth)


def _head(layer: str, forward: Mapping[str, Departure], depth: Mapping[str, int]) -> str:
    """Return the first in depth order of the layers that moved without a gap, up to the given one.

    Of many layers that a fault reaches within few steps, chance decides which one crosses the bound first. One calm
    layer between two that moved is no gap.
    """
    head = layer
    for name in sorted(forward, key=depth.__getitem__, reverse=True):
        if 0 < depth[head] - depth[name] <= 2:
            head = name
    return head


def _travels(forward: Mapping[str, Departure], depth: Mapping[str, int]) -> bool:
    """Whether nearly all layers moved behind one another, from one place on, and not at once."""
    first = min(forward, key=lambda name: depth[name])
    if depth[first] >= 2:  # the layers before it are calm, so they do not share the cause
        return True
    begin = min(d.step for d in forward.values())
    soon = [name for name, d in forward.items() if d.step <= begin + 2]
    return first in soon and 2 * len(soon) <= len(depth)


def _words(
    onset: Onset,
    alert: Alert,
    moved: Mapping[str, Departure],
    layers: Sequence[str],
    why: str,
    known: str,
    bound: float,
) -> tuple[str, str, str]:
    """Return what happened, what to look at, and what to try."""
    at = f"{onset.step:,}"
    if onset.kind == "nonfinite":
        where = "The training" if alert.layer == TRAINING else f"The input of {onset.layer}"
        held = f"The {plain_name(alert.statistic)}" if alert.statistic != "nonfinite" else where
        advice = f"Look at the batch of step {at}."
        if alert.layer != TRAINING:
            advice = (
                f"{onset.layer} is the first layer in depth order that saw it: look at what feeds it, and at the batch "
                f"of step {at}."
            )
        remedy = (
            "Check that batch for NaN. If it is clean, train this part in bfloat16 or float32, or clip the gradient "
            "(Trainer(gradient_clip_val=1.0)). Go on from a checkpoint before this step."
        )
        return f"{held} held a NaN or an infinity at step {at}.", advice, remedy
    shown = moved.get(onset.layer) if onset.scope in ("one layer", "from here on") else None
    event: Any = shown if shown is not None and onset.layer != alert.layer else alert
    what = measured(
        "" if event.layer == TRAINING else event.layer, event.statistic, event.value, event.usual, event.score, bound
    )
    if onset.kind == "bound":
        advice = alert.reason[:1].upper() + alert.reason[1:].rstrip(".") + "."
        return f"Step {at}: {what}", advice, remedy_of(alert.statistic, first=False, back_to=onset.step)
    if onset.scope == "everywhere":
        head = f"Everywhere at once, since step {at}: {len(moved)} of {len(layers)} layers left their usual range"
        head = f"{head} within {TOGETHER} steps. {what}" if moved else f"Everywhere at once, since step {at}: {what}"
        unmoved = f"None of these is known to have moved: {known}. " if known else ""
        look = why or (
            f"{unmoved}Look at learning rate, weight decay and data, and at what changed just before step {at}."
        )
        return head, f"The cause is global and not one layer. {look}", global_remedy(onset.cause, onset.step)
    if onset.scope == "training":
        calm = "no layer has left its usual range"
        if alert.layer != TRAINING:
            calm = "the loss and the gradients left their usual range, and no layer's input did"
        look = f"Since step {at}: {calm}. {what}"
        return (
            look,
            f"Look at the batches and targets of these steps. {why}".rstrip(),
            remedy_of(onset.statistic, first=False, back_to=onset.step),
        )
    place = list(layers).index(onset.layer) if onset.layer in layers else -1
    one = onset.scope == "one layer"
    head = f"Since step {at}, {'one layer' if one else 'from here on'}: {what}"
    backward = bool(moved) and all(d.gradient for d in moved.values())
    if not one and len(moved) > 1:
        first = "the first one in reverse depth order is named" if backward else "the first one is named"
        head += f" Within {TOGETHER} steps {len(moved)} of {len(layers)} layers moved, and {first}."
    channels = f" Its largest channels are {', '.join(map(str, onset.channels))}." if onset.channels else ""
    fell = event.value < event.usual
    remedy = remedy_of(event.statistic, first=place == 0 and not backward, back_to=onset.step, fell=fell)
    if place < 0:
        return head, f"Look at {onset.layer}, and at what changed just before step {at}.{channels}", remedy
    if backward:
        after = f"between {onset.layer} and {layers[place + 1]}" if place + 1 < len(layers) else "behind the last norm"
        calm = f"Only {onset.layer} moved" if one else "The layers behind it were calm"
        return head, f"{calm}, so the cause lies {after}: look at the weights there.{channels}", remedy
    if place == 0:
        look = f"It begins at the first norm, {onset.layer}: look at input data and embedding."
        return head, f"{look}{channels}", remedy
    between = f"between {layers[place - 1]} and {onset.layer}"
    calm = f"Only {onset.layer} moved" if one else "The layers before it were calm at that step"
    return head, f"{calm}, so the cause lies {between}: look at the weights there.{channels}", remedy
