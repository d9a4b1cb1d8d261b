"""`Rollback`: go back to the last good state, and leave out the data that came since."""

from collections import deque
from dataclasses import dataclass

from stabnorm._checks import check_count
from stabnorm.actions.action import Action, OutOfBudget, Training, Why, Worker
from stabnorm.actions.snapshot import Snapshot


@dataclass(frozen=True)
class Rollback(Action):
    """Goes back to the last state well before an alarm; the data that came since is not seen again.

    The state is weights, buffers, optimizers, schedulers, scaler, random state, and what the monitor holds usual. It
    lies in the host's memory, `keep` times. The steps are counted on, so that no logger sees a step twice.

    Args:
        every: steps from one state to the next. Default: 100.
        keep: how many states are kept. Default: 3.
        before: how many steps before the alarm a state must be, because what led to it began earlier. Default: 10.
        budget: how often this is done in a training, at most; one more is an error. Default: 3.
    """

    every: int = 100
    keep: int = 3
    before: int = 10
    budget: int = 3
    name = "rollback"
    rest = 0  # an alarm after it is another one

    def __post_init__(self) -> None:
        for name in ("every", "keep", "budget"):
            check_count(name, getattr(self, name))
        check_count("before", self.before, 0)

    def start(self, training: Training) -> Worker:
        """Return the worker."""
        return _RollingBack(self, training)


class _RollingBack(Worker):
    action: Rollback

    def __init__(self, action: Rollback, training: Training) -> None:
        super().__init__(action, training)
        self._states = deque[tuple[int, Snapshot, dict[str, object]]](maxlen=action.keep)
        self._done = 0

    def begin_step(self) -> None:
        if not self._states:
            self._keep()

    def end_step(self, *, calm: bool) -> None:
        if calm and (not self._states or self.training.monitor.steps_done >= self._states[-1][0] + self.action.every):
            self._keep()

    def _keep(self) -> None:
        training = self.training
        snapshot = Snapshot(
            [training.model, *training.averages], training.optimizers, training.schedulers, training.scaler
        )
        self._states.append((training.monitor.steps_done, snapshot, training.monitor.state_dict()))

    def act(self, why: Why) -> str:
        """Go back.

        Raises:
            OutOfBudget: this was done too often, or no state is old enough.
        """
        self._done += 1
        while len(self._states) > 1 and self._states[-1][0] > why.step - self.action.before:
            self._states.pop()
        if self._done > self.action.budget or not self._states:
            raise OutOfBudget(
                f"the training would go back for the {self._done}. time, and the budget is {self.action.budget}. The "
                f"last alarm: {why.reason}. Other data did not help: lower the learning rate, or look at that layer"
            )
        step, snapshot, monitored = self._states[-1]
        if step > why.step:
            raise OutOfBudget(
                f"there is no state from before step {why.step} to go back to: the first one is of step {step}"
            )
        snapshot.restore()
        self.training.monitor.load_baselines(monitored)
        lost = self.training.monitor.steps_done - step
        return f"the training is what it was after {step} steps; the data of the last {lost} steps is left out"
