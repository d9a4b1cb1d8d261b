"""What the terminal shows while a run trains: the messages of our logger, and a verdict in the progress bar."""

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stabnorm.monitor.baseline import ARMED
from stabnorm.monitor.monitor import StabilityMonitor

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

logger = logging.getLogger("stabnorm")


def show_messages() -> None:
    """Let the logger's messages reach the terminal, as Lightning does with its own, unless the user has arranged it."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logger.addHandler(LinesOfTheirOwn())


class LinesOfTheirOwn(logging.Handler):
    """Writes messages to the standard error output, each on a line of its own, above a progress bar that is there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        try:
            line = self.format(record)
            tqdm: Any = sys.modules.get("tqdm")
            if tqdm is not None and tqdm.tqdm._instances:
                tqdm.tqdm.write(line, file=sys.stderr)
            else:  # Rich moves its bars away by itself, if a message goes where `sys.stderr` is then
                print(line, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def short_verdict(monitor: StabilityMonitor) -> str:
    """Say in a few words how the training goes, from what the host knows already.

    >>> import torch
    >>> short_verdict(StabilityMonitor(torch.nn.LayerNorm(4)))
    'learning 0/256'
    """
    if monitor.alerts:
        last, count = monitor.alerts[-1], len(monitor.alerts)
        return f"{count} alert{'s'[: count > 1]}, last at {last.step} in {last.layer}"
    return "calm" if monitor.compared else f"learning {monitor.steps_done}/{ARMED}"


class VerdictInBar:
    """Shows a few words in Lightning's progress bar, behind the metrics.

    Args:
        words: returns them.
    """

    def __init__(self, words: Callable[[], str]) -> None:
        self._words = words
        self._bar: Any = None

    def put_on(self, trainer: "Trainer") -> None:
        """Add the words to the bar, if the Trainer has one."""
        bar: Any = trainer.progress_bar_callback
        if self._bar is None and bar is not None and hasattr(bar, "get_metrics"):
            metrics_of = bar.get_metrics

            def get_metrics(trainer: "Trainer", pl_module: "LightningModule") -> dict[str, Any]:
                return {**metrics_of(trainer, pl_module), "stability": self._words()}

            self._bar, bar.get_metrics = bar, get_metrics

    def take_off(self) -> None:
        """Give the bar its own metrics back."""
        if self._bar is not None:
            self._bar.__dict__.pop("get_metrics", None)
            self._bar = None
