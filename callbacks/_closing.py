"""The end of a watched fit: pictures, a table of the layers that you should look at, and where everything lies."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stabnorm.callbacks._live import REPORT, LiveReport
from stabnorm.callbacks._outputs import log_companion, log_picture, log_text, summary_writers
from stabnorm.callbacks._terminal import logger
from stabnorm.dashboard.heatmap import heatmap
from stabnorm.dashboard.table import Row, format_table, layers_worth_a_look, markdown_table
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.monitor.statistics import Statistic

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

_PICTURES = {
    "token_std_mean": "how large the input of each norm is",
    "amax": "the largest input of each norm",
    "mean_discrepancy": "how far batch means are from running means",
    "var_fluctuation": "how the variances change from step to step",
    "affine_residual": "what no affine map per channel could replace",
    "grad_gain": "how strong the gradient at each norm is",
}


class ClosingReport:
    """Writes what a watched fit leaves behind, while the loggers are still open.

    Args:
        trainer: the Trainer.
        monitor: the monitor, after its last flush.
        directory: the folder of the run. Default: none, and nothing is drawn.
        live: the report that was kept up to date during the fit.
    """

    def __init__(
        self, trainer: "Trainer", monitor: StabilityMonitor, directory: Path | None, live: LiveReport | None
    ) -> None:
        self._trainer, self._monitor, self._directory, self._live = trainer, monitor, directory, live
        self._steps: npt.NDArray[Any] = monitor.history_steps().numpy()

    def write(self) -> None:
        """Write and log everything; what fails is told, and the rest goes on."""
        if not self._steps.size:
            return
        monitor, guard = self._monitor, self._monitor.outputs
        rows = guard.attempt("the closing table cannot be made", self._rows)
        if self._live is not None:
            self._live.close(int(self._steps[-1]))
        guard.attempt("the closing words cannot be logged", self._say, rows)
        if self._directory is None:
            return
        for name, meaning in _PICTURES.items():
            if name in monitor.history():
                guard.attempt(f"no picture of {name} is drawn", self._draw, self._directory, name, meaning)
        for track in monitor.companions.values():
            what = f"no pictures of the companion {track.name!r} are drawn"
            guard.attempt(what, log_companion, self._trainer, guard, track, monitor.alerts, self._directory)
        if rows is not None:
            guard.attempt("the closing table cannot be logged", self._log_table, rows)

    def _say(self, rows: list[Row] | None) -> None:
        """Log the closing table, the cost, and where everything lies, as one message."""
        monitor = self._monitor
        words = [] if rows is None else [format_table(rows, steps=len(self._steps), compared=monitor.compared)]
        words.append(f"monitoring cost {monitor.cost}")
        places = [str(writer.log_dir) for writer in summary_writers(self._trainer, monitor.outputs)]
        if self._directory is not None and self._directory.exists():
            places.append(str(self._directory))
            words.append(f"stabnorm: the report is {self._directory / REPORT}")
        if places:
            words.append(f"stabnorm: record and pictures are in {', '.join(places)}; `stabnorm view` shows them")
        logger.info("%s", "\n".join(words))

    def _log_table(self, rows: list[Row]) -> None:
        markdown = markdown_table(rows, steps=len(self._steps), compared=self._monitor.compared)
        step = int(self._steps[-1])
        log_text(self._trainer, self._monitor.outputs, "stability/closing_table", markdown, step)

    def _rows(self) -> list[Row]:
        monitor = self._monitor
        history = {name: values.numpy() for name, values in monitor.history().items()}
        for name in {"mean_discrepancy", "var_discrepancy"} & set(history):
            # Only layers with running statistics have a discrepancy, and it needs 5 / momentum steps to settle.
            settled = monitor.has_running_statistics & (len(self._steps) >= 50)
            history[name] = np.where(settled, history[name], np.nan)
        for statistic in monitor.statistics:
            if statistic.axis == "gradient" or "optimizer" in statistic.needs_all:
                # The norm of a layer that is being switched gets no gradient any more, as it should be.
                history[statistic.name] = np.where(monitor.fading, np.nan, history[statistic.name])
        alerts = [alert.as_dict() for alert in monitor.alerts]
        rows = layers_worth_a_look(monitor.layers, history, alerts, steps=self._steps, **_bounds(monitor.statistics))
        for track in monitor.companions.values():
            measured = {name: values.numpy() for name, values in track.history().items()}
            steps = track.history_steps().numpy()
            rows += layers_worth_a_look(track.rows, measured, [], steps=steps, **_bounds(track.statistics))
        return rows

    def _draw(self, directory: Path, name: str, meaning: str) -> None:
        monitor = self._monitor
        marks = [(alert.step, alert.layer) for alert in monitor.alerts if alert.statistic in (name, "nonfinite")]
        values = monitor.history()[name].numpy()
        picture = heatmap(values, self._steps, monitor.layers, f"{name}: {meaning}", marks=marks)
        log_picture(self._trainer, monitor.outputs, f"stability/{name}", picture, int(self._steps[-1]), directory)


def _bounds(statistics: Sequence[Statistic]) -> dict[str, dict[str, tuple[float, str]]]:
    """Return the bounds of statistics with their advice."""
    return {
        "thresholds": {s.name: (s.threshold, s.advice) for s in statistics if s.threshold is not None},
        "least": {s.name: (s.least, s.advice) for s in statistics if s.least is not None},
    }
