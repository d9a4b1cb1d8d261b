"""What an action is: its description, what it may do to a training, and the worker that does it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import nn
from torch.optim import Optimizer

from stabnorm.errors import StabNormError
from stabnorm.monitor.monitor import StabilityMonitor


class OutOfBudget(StabNormError):
    """An action was to be done more often than its budget allows, so the training ends."""


class Holds(Protocol):
    """A switch of norms that can wait, such as `stabnorm.ProgressiveSwitch`."""

    def hold(self, steps: int) -> None:
        """Leave lam where it is for so many steps."""


class Why(NamedTuple):
    """Why an action is taken.

    Attributes:
        kind: the kind of alarm.
        step: the optimizer step that it is about.
        layer: the layer that it names; "" where it names none.
        reason: one sentence that says what is wrong.
    """

    kind: str
    step: int
    layer: str
    reason: str


@dataclass
class Training:
    """What actions may change in a training, or ask of it. All but the first three parts may be left out.

    Attributes:
        model: the model that is trained.
        monitor: its monitor, which raises the alarms.
        optimizers: those that step on it.
        schedulers: the schedulers of their learning rates.
        scaler: the gradient scaler of mixed precision.
        averages: averaged copies of the model, which a rollback takes back, too.
        directory: a folder for checkpoints.
        save: writes a checkpoint of everything to a file; it may return a few words that say where it is.
        stop: ends the training after this step; it is given the reason.
        switch: the switch of the model's norms.
    """

    model: nn.Module
    monitor: StabilityMonitor
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[Any] = ()
    scaler: Any = None
    averages: Sequence[nn.Module] = ()
    directory: Path | None = None
    save: Callable[[Path], str | None] | None = None
    stop: Callable[[str], None] | None = None
    switch: Holds | None = None
    kept: dict[str, Any] = field(default_factory=dict)


class Worker:
    """Does an action in one training.

    Args:
        action: what is to be done.
        training: where.
    """

    def __init__(self, action: Any, training: Training) -> None:
        self.action, self.training = action, training

    def begin_step(self) -> None:
        """Be told that a step begins, before its first forward."""

    def before_step(self) -> None:
        """Be told that the optimizer steps next; gradients are there."""

    def end_step(self, *, calm: bool) -> None:
        """Be told that a step is over, and whether there was no alarm."""

    def act(self, why: Why) -> str:
        """Do it, and say in a few words what was done."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as tensors and plain containers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


class Action:
    """Something to be done at an alarm. A subclass is a frozen dataclass of its options.

    Attributes:
        name: what `actions=` calls it.
        worker: the class that does it.
        before_step: whether it is decided between the backward and the optimizer's step.
        rest: steps after which it may be done again, because alarms come in swarms.
        times: how often it is done in a training, at most; None is without a bound.
    """

    name: ClassVar[str]
    worker: ClassVar[type[Worker]]
    before_step: ClassVar[bool] = False
    rest: ClassVar[int] = 100
    times: int | None = None

    def start(self, training: Training) -> Worker:
        """Return the worker for a training.

        Raises:
            ValueError: this training lacks what the action needs.
        """
        return self.worker(self, training)
