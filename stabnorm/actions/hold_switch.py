"""`HoldSwitch`: let a switch of norms wait."""

from dataclasses import dataclass

from stabnorm._checks import check_count
from stabnorm.actions.action import Action, Training, Why, Worker


@dataclass(frozen=True)
class HoldSwitch(Action):
    """Leaves lam where it is for some steps, if the norms of the model are being switched.

    Args:
        steps: how many. Default: 200.
        times: how often this is done in a training, at most. Default: 5.
    """

    steps: int = 200
    times: int | None = 5
    name = "hold_switch"

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        if self.times is not None:
            check_count("times", self.times)

    def start(self, training: Training) -> Worker:
        """Return the worker."""
        if training.switch is None:
            raise ValueError(
                "the action 'hold_switch' needs a switch: a ProgressiveNormCallback beside StabilityCallback, or "
                "Training(switch=ProgressiveSwitch(...))"
            )
        return _Holding(self, training)


class _Holding(Worker):
    action: HoldSwitch

    def act(self, why: Why) -> str:
        assert self.training.switch is not None
        self.training.switch.hold(self.action.steps)
        return f"lam stays where it is for {self.action.steps} steps"
