"""What a run shows besides its record: a picture and a text at each alert, a report at its end, words in the bar."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stabnorm.callbacks._outputs import log_picture, log_text
from stabnorm.callbacks._terminal import VerdictInBar, short_verdict
from stabnorm.dashboard.live import LivePicture
from stabnorm.monitor._folders import FOLDER, run_name
from stabnorm.monitor.monitor import StabilityMonitor

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

# The first by name in every list of pictures and texts.
PICTURE, TEXT = "stability/00_relative_map", "stability/00_report"
REPORT = "report.md"


class LiveReport:
    """Draws and tells how a training goes, in every logger, in the progress bar, and in a file.

    Args:
        trainer: the Trainer, whose loggers are open.
        monitor: the monitor; `writer` becomes one of its records.
        directory: the folder of the run.
    """

    def __init__(self, trainer: "Trainer", monitor: StabilityMonitor, directory: Path) -> None:
        self._trainer, self._guard, self._directory = trainer, monitor.outputs, directory
        run = directory.parent if directory.name == FOLDER else directory
        self.writer = LivePicture(self._draw, self._tell, run_name(run))
        no_words = "the progress bar has no verdict"
        self._bar = VerdictInBar(lambda: self._guard.attempt(no_words, short_verdict, monitor) or "")
        self._guard.attempt(no_words, self._bar.put_on, trainer)

    def _draw(self, image: npt.NDArray[np.uint8], step: int) -> None:
        log_picture(self._trainer, self._guard, PICTURE, image, step, self._directory)

    def _tell(self, markdown: str, step: int) -> None:
        log_text(self._trainer, self._guard, TEXT, markdown, step)
        self._guard.attempt(f"no report can be written to {self._directory}", self._write, markdown)

    def _write(self, markdown: str) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / REPORT).write_text(markdown, encoding="utf-8")

    def close(self, step: int) -> None:
        """Draw and tell the whole run, at its last step."""
        image = self._guard.attempt("no picture of the whole run is drawn", self.writer.picture)
        if image is not None:
            self._draw(image, step)
        markdown = self._guard.attempt("there is no report", self.writer.report)
        if markdown is not None:
            self._tell(markdown, step)

    def leave_bar(self) -> None:
        """Give the progress bar its own metrics back."""
        self._guard.attempt("the progress bar keeps its verdict", self._bar.take_off)
