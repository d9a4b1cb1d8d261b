"""Functions that write a callback's results: records, scalars, images and text of the loggers.

Loggers are told apart by their methods, because their classes exist twice, once in each Lightning namespace.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stabnorm.dashboard.headline import custom_scalars_layout, headline
from stabnorm.dashboard.heatmap import heatmap
from stabnorm.dashboard.images import log_image, shows_images
from stabnorm.monitor._folders import local_folder
from stabnorm.monitor.detect import Alert
from stabnorm.monitor.record import Block, FileRecord, RecordWriter, TensorBoardRecord
from stabnorm.monitor.track import CompanionTrack

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from torch.utils.tensorboard import SummaryWriter


def summary_writer(logger: Any) -> "SummaryWriter | None":
    """Return TensorBoard's writer of a logger; None for other loggers, tensorboardX and the dummy of `fast_dev_run`."""
    from torch.utils.tensorboard import SummaryWriter

    experiment = getattr(logger, "experiment", None)
    return experiment if isinstance(experiment, SummaryWriter) else None


def output_directory(trainer: "Trainer") -> Path:
    """Return a folder for this run: inside the first logger's folder for the run, or a new one.

    ``log_dir`` belongs to one run; ``save_dir`` is shared by all runs of a logger.
    """
    own = next((d for logger in trainer.loggers if (d := getattr(logger, "log_dir", None))), None)
    shared = next((d for logger in trainer.loggers if (d := getattr(logger, "save_dir", None))), None)
    root = own or shared or trainer.default_root_dir
    folder = _local(root)
    if own and folder:
        return folder / "stabnorm"
    if folder is None:
        folder = Path.cwd()
        warnings.warn(
            f"{root} is not a folder of this machine, so stabnorm writes its files below {folder}. To have them "
            "elsewhere, give the Trainer a logger or a default_root_dir with a folder of this machine",
            stacklevel=2,
        )
    runs = folder / "stabnorm"
    taken = (int(p.name[4:]) for p in runs.glob("run_*") if p.name[4:].isdigit())
    return runs / f"run_{max(taken, default=-1) + 1}"


def _local(root: str) -> Path | None:
    try:
        return local_folder(root)
    except ValueError:
        return None


def record_writers(trainer: "Trainer", directory: Path) -> list[RecordWriter]:
    """Return writers of the record: into TensorBoard's event file if there is one, else into files in ``directory``."""
    writers = [writer for logger in trainer.loggers if (writer := summary_writer(logger)) is not None]
    if writers:
        return [TensorBoardRecord(writer) for writer in writers]
    return [FileRecord(directory)]


def log_picture(trainer: "Trainer", key: str, image: npt.NDArray[np.uint8], step: int, directory: Path) -> None:
    """Log a picture with every logger that shows pictures; if there is none, write a file to ``directory``."""
    showing: list[Any] = [logger for logger in trainer.loggers if shows_images(logger)]
    for logger in showing or [None]:
        log_image(logger, key, image, step, directory)


def log_companion(trainer: "Trainer", track: CompanionTrack, alerts: Sequence[Alert], directory: Path) -> None:
    """Draw a heat map of row by step for each of a companion's statistics."""
    steps = track.history_steps().numpy()
    for statistic in track.statistics:
        values = track.history()[statistic.name].numpy()
        if not np.isnan(values).all():
            marks = [(alert.step, alert.layer) for alert in alerts if alert.statistic == statistic.name]
            picture = heatmap(values, steps, track.rows, f"{statistic.name} ({statistic.unit})", marks=marks)
            log_picture(trainer, f"stability/{statistic.name}", picture, int(steps[-1]), directory)


def log_text(trainer: "Trainer", key: str, markdown: str, step: int) -> None:
    """Log a Markdown text with TensorBoard."""
    for logger in trainer.loggers:
        if (writer := summary_writer(logger)) is not None:
            writer.add_text(key, markdown, step)


class HeadlineScalars:
    """A record writer that logs only a dozen numbers of every flush, as ordinary scalars of every logger.

    Args:
        loggers: the Trainer's loggers.
        statistics: names of the watched statistics.
        alerts: returns the number of alerts so far.
        overhead: returns the monitor's cost so far, in percent of the step.
    """

    def __init__(
        self,
        loggers: Sequence[Any],
        statistics: Sequence[str],
        alerts: Callable[[], int],
        overhead: Callable[[], float],
    ) -> None:
        self._loggers, self._statistics, self._alerts, self._overhead = loggers, statistics, alerts, overhead
        for logger in loggers:
            if (writer := summary_writer(logger)) is not None:
                writer.add_custom_scalars(custom_scalars_layout(statistics))

    def write_block(self, block: Block) -> None:
        """Log the scalars of a block at its last step; companions have pictures instead."""
        if block.companion:
            return
        for logger in self._loggers:
            separator = getattr(logger, "group_separator", "/")
            scalars = headline(
                block, self._statistics, alerts=self._alerts(), overhead=self._overhead(), separator=separator
            )
            logger.log_metrics(scalars, step=block.last_step)

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        """Do nothing, because an event is not a scalar."""

    def close(self) -> None:
        """Do nothing, because the Trainer closes the loggers."""
