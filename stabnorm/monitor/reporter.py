"""`Reporter`: takes what a flush has brought to the log, the record and `on_alert`, and groups alerts into onsets."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stabnorm.monitor.alerts import Alert, Departure
from stabnorm.monitor.onsets import Onset, OnsetFollower, Watched, worst_channels
from stabnorm.monitor.outputs import Outputs, say
from stabnorm.monitor.record import Block, RecordWriter


class Reporter:
    """Takes blocks and alerts to the log, the record and `on_alert`, and groups alerts into onsets.

    All processes know alerts and onsets, and only one of them speaks: it writes and warns.

    Args:
        layers: names of the norms, in depth order.
        on_alert: is called with each alert. Default: nothing is called.

    >>> reporter = Reporter(["norm"], on_alert=lambda alert: print(alert.layer, alert.value))
    >>> reporter.take([Alert(7, "norm", "amax", 9.0, 3.0, "it is large")], [])
    norm 9.0
    """

    def __init__(self, layers: Sequence[str], on_alert: Callable[[Alert], object] | None = None) -> None:
        self.layers, self.on_alert = tuple(layers), on_alert
        self.alerts: list[Alert] = []
        self.records: list[RecordWriter] = []
        self.outputs = Outputs()
        self.speaks = True
        self._follower = OnsetFollower()
        self._raised: list[Alert] = []  # since alerts were grouped last
        self._departed: list[Departure] = []
        self._nothing_ran = False

    @property
    def onsets(self) -> list[Onset]:
        """The alerts so far, grouped."""
        return list(self._follower.onsets)

    def write_block(self, block: Block) -> None:
        """Write a block into the record."""
        if self.speaks:
            self._warn_if_nothing_ran(block)
            self.outputs.write_block(self.records, block)

    def take(self, alerts: Sequence[Alert], departures: Sequence[Departure]) -> None:
        """Write alerts to the log and the record, call `on_alert`, and keep them and the departures for `group`."""
        self.alerts += alerts
        self._raised += alerts
        self._departed += departures
        for alert in alerts if self.speaks else ():
            where = f"stabnorm, step {alert.step}, {alert.layer}"
            say("%s: %s = %.4g: %s", where, alert.statistic, alert.value, alert.reason)
            if self.on_alert is not None:
                self.outputs.attempt("on_alert raised an error", self.on_alert, alert)
            self.outputs.write_event(self.records, "alert", alert.step, alert.as_dict())

    def group(self, norms: Block, rows: Mapping[str, int], steps_watched: int) -> None:
        """Group what came since the last call, and write the onsets that are new or have grown into the record.

        Args:
            norms: the block of the norms.
            rows: number of rows of each companion.
            steps_watched: number of steps that the detector of the norms has seen.
        """
        self._follower.settings.see(norms)
        watched, channels = Watched(self.layers, rows, steps_watched), functools.partial(worst_channels, norms)
        seen = self._raised, self._departed, watched, channels
        self._raised, self._departed = [], []
        changed = self.outputs.attempt("alerts are not grouped", self._follower.add, *seen)
        for onset in (changed or []) if self.speaks else ():
            self.outputs.write_event(self.records, "onset", onset.step, onset.as_dict())

    def announce(self, step: int, reason: str) -> None:
        """Note that something was changed on purpose before a step, so that an onset soon after names it."""
        self._follower.settings.announced.append((step, reason))
        if self.speaks:
            self.outputs.write_event(self.records, "announced", step, {"step": step, "reason": reason})

    def _warn_if_nothing_ran(self, block: Block) -> None:
        if self._nothing_ran or "tokens" not in block.series or (block.series["tokens"] > 0).any():
            return
        self._nothing_ran = True
        say(
            "stabnorm: no monitored norm ran in training mode in %d steps. Is the model in training mode, "
            "model.train()? If it runs from a fixed graph, such as one of torch.jit or your own CUDA graph, attach the "
            "monitor before that graph is made",
            block.num_steps,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return alerts and onsets as plain containers."""
        return {"alerts": [alert.as_dict() for alert in self.alerts], "onsets": self._follower.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; one of an older version has no onsets."""
        self.alerts = [Alert(**alert) for alert in state["alerts"]]
        self._follower.load_state_dict(state.get("onsets", []))
