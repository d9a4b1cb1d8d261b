"""`Stop`: end the training."""

from dataclasses import dataclass

from stabnorm.actions.action import Action, Training, Why, Worker


@dataclass(frozen=True)
class Stop(Action):
    """Ends the training after the step of the alarm."""

    times: int | None = 1
    name = "stop"

    def start(self, training: Training) -> Worker:
        """Return the worker."""
        if training.stop is None:
            raise ValueError("the action 'stop' needs Training(stop=function), which is given the reason")
        return _Stopping(self, training)


class _Stopping(Worker):
    def act(self, why: Why) -> str:
        assert self.training.stop is not None
        self.training.stop(why.reason)
        return "the training ends"
