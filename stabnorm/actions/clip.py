"""`Clip`: clip each gradient against its own past, for some time after an alarm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stabnorm._checks import check_count, check_number
from stabnorm.actions.action import Action, Training, Why, Worker
from stabnorm.clipping import AdaptiveClip


@dataclass(frozen=True)
class Clip(Action):
    """Clips each gradient tensor to a multiple of its usual norm, from an alarm on, see `AdaptiveClip`.

    What is usual is learnt from the first step on; nothing is read from the device.

    Args:
        steps: how long gradients are clipped after an alarm. Default: 500.
        bound: by how much a norm may exceed its past. Default: 1.05.
    """

    steps: int = 500
    bound: float = 1.05
    name = "clip"

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_number("bound", self.bound, least=1)

    def start(self, training: Training) -> Worker:
        """Return the worker."""
        return _Clipping(self, training)


class _Clipping(Worker):
    action: Clip

    def __init__(self, action: Clip, training: Training) -> None:
        super().__init__(action, training)
        parameters = [p for o in training.optimizers for group in o.param_groups for p in group["params"]]
        self._clip = AdaptiveClip(parameters, bound=action.bound, warmup_norm=None)
        self._until = 0
        self._learnt = -1

    def before_step(self) -> None:
        step = self.training.monitor.steps_done
        if self._learnt != step:  # with several optimizers this is asked several times in a step
            self._learnt = step
            self._clip.step(clip=step < self._until)

    def act(self, why: Why) -> str:
        self._until = self.training.monitor.steps_done + self.action.steps
        return f"each gradient is clipped to {self.action.bound:g} times its past until step {self._until}"

    def state_dict(self) -> dict[str, Any]:
        return {"clip": self._clip.state_dict(), "until": self._until}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._clip.load_state_dict(state["clip"])
        self._until = state["until"]
