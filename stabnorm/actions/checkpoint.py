"""`Checkpoint`: save everything at an alarm."""

from dataclasses import dataclass

from stabnorm._checks import check_count
from stabnorm.actions.action import Action, Training, Why, Worker


@dataclass(frozen=True)
class Checkpoint(Action):
    """Saves a checkpoint at an alarm, into `alarms/` of the run's folder.

    Args:
        times: the largest number of these checkpoints in a training. Default: 3.
    """

    times: int | None = 3
    name = "checkpoint"

    def __post_init__(self) -> None:
        if self.times is not None:
            check_count("times", self.times)

    def start(self, training: Training) -> Worker:
        """Return the worker."""
        if training.save is None or training.directory is None:
            raise ValueError("the action 'checkpoint' needs Training(save=function, directory=folder)")
        return _Saving(self, training)


class _Saving(Worker):
    def act(self, why: Why) -> str:
        training = self.training
        assert training.directory is not None
        assert training.save is not None
        path = training.directory / "alarms" / f"step{training.monitor.steps_done}-{why.kind}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        return training.save(path) or f"a checkpoint is in {path}"
