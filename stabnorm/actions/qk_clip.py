"""`QKClip`: shrink queries and keys of the heads whose logits are too large."""

from dataclasses import dataclass

import torch

from stabnorm._checks import check_count, check_number
from stabnorm.actions.action import Action, Training, Why, Worker
from stabnorm.remedies.qk import qk_clip

LOGITS = "attention_logit_max"


@dataclass(frozen=True)
class QKClip(Action):
    """Shrinks queries and keys of each head whose largest logit is above a threshold, see `stabnorm.remedies.qk_clip`.

    The companion "attention" measures the logits.

    Args:
        threshold: the largest logit that is allowed. Default: 100.
        times: how often this is done in a training, at most; None is without a bound. Default: None.
    """

    threshold: float = 100.0
    times: int | None = None
    name = "qk_clip"

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, above=0)
        if self.times is not None:
            check_count("times", self.times)

    def start(self, training: Training) -> Worker:
        """Return the worker."""
        track = training.monitor.companions.get("attention")
        if track is None or LOGITS not in [statistic.name for statistic in track.statistics]:
            raise ValueError("the action 'qk_clip' needs the logits of each head: give companions=['attention']")
        return _Shrinking(self, training)


class _Shrinking(Worker):
    action: QKClip

    def act(self, why: Why) -> str:
        track = self.training.monitor.companions["attention"]
        history = track.history()[LOGITS]
        measured = torch.nonzero(~history.isnan().all(1)).flatten()
        latest = history[int(measured[-1])].tolist() if len(measured) else []
        logits = {name: value for name, value in zip(track.rows, latest, strict=False) if value > self.action.threshold}
        report = qk_clip(self.training.model, logits, self.action.threshold)
        if not logits:
            return f"no head has a logit above {self.action.threshold:g}, and none is shrunk"
        self.training.monitor.announce_change("queries and keys were shrunk")  # the logits fall, as they should
        return f"{report}"
