"""Functions that write a callback's results: records, scalars, images and text of the loggers.

Loggers are told apart by their methods, because their classes exist twice, once in each Lightning namespace.
"""

import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from stabnorm.dashboard.headline import custom_scalars_layout, headline
from stabnorm.dashboard.heatmap import heatmap
from stabnorm.dashboard.images import log_image, shows_images
from stabnorm.monitor._folders import FOLDER, local_folder
from stabnorm.monitor.alerts import Alert
from stabnorm.monitor.companion_tracks import CompanionTrack
from stabnorm.monitor.outputs import Guard, cause, say
from stabnorm.monitor.record import MOST_BYTES, Block, FileRecord, RecordWriter, TensorBoardRecord

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from torch.utils.tensorboard import SummaryWriter


def summary_writer(logger: Any) -> "SummaryWriter | None":
    """Return TensorBoard's writer of a logger; None for other loggers, tensorboardX and the dummy of `fast_dev_run`."""
    from torch.utils.tensorboard import SummaryWriter

    experiment = getattr(logger, "experiment", None)
    return experiment if isinstance(experiment, SummaryWriter) else None


_directories: "WeakKeyDictionary[Trainer, Path]" = WeakKeyDictionary()


def summary_writers(trainer: "Trainer", guard: Guard) -> "list[SummaryWriter]":
    """Return TensorBoard's writers of all loggers that have one."""
    found = [guard.attempt(f"{type(one).__name__} gives no writer", summary_writer, one) for one in trainer.loggers]
    return [writer for writer in found if writer is not None]


def begin_run(trainer: "Trainer") -> None:
    """Let a fit that begins anew have a folder of its own; each of our callbacks calls this in its `setup`."""
    if trainer.global_step == 0:
        _directories.pop(trainer, None)


def output_directory(trainer: "Trainer") -> Path:
    """Return the folder of this run, the same one for all callbacks: in the first logger's folder, or a new one.

    ``log_dir`` belongs to one run; ``save_dir`` is shared by all runs of a logger.
    """
    if trainer not in _directories:
        _directories[trainer] = _new_directory(trainer)
    return _directories[trainer]


def shared_directory(trainer: "Trainer") -> Path | None:
    """Return rank 0's folder of this run on every rank, which must all ask; None where nothing is to be written."""
    if getattr(trainer, "fast_dev_run", False):
        return None
    return Path(trainer.strategy.broadcast(str(output_directory(trainer)) if trainer.is_global_zero else ""))


def _new_directory(trainer: "Trainer") -> Path:
    own, shared = (next(filter(None, _folders(trainer, name)), None) for name in ("log_dir", "save_dir"))
    root = own or shared or trainer.default_root_dir
    folder = _local(root)
    if own and folder:
        return folder / FOLDER
    if folder is None:
        folder = Path.cwd()
        warnings.warn(
            f"{root} is not a folder of this machine, so stabnorm writes its files below {folder}. To have them "
            "elsewhere, give the Trainer a logger or a default_root_dir with a folder of this machine",
            stacklevel=2,
        )
    runs = folder / FOLDER
    taken = (int(p.name[4:]) for p in runs.glob("run_*") if p.name[4:].isdigit())
    for number in itertools.count(max(taken, default=-1) + 1):
        try:
            (runs / f"run_{number}").mkdir(parents=True)
        except FileExistsError:  # another process has taken it a moment ago
            continue
        except OSError:  # whoever writes there will say why that is impossible
            pass
        return runs / f"run_{number}"
    raise AssertionError("numbers do not end")


def _folders(trainer: "Trainer", name: str) -> Iterator[str | None]:
    for logger in trainer.loggers:
        yield Guard().attempt(f"{type(logger).__name__} does not tell its {name}", _folder_of, logger, name)


def _folder_of(logger: Any, name: str) -> str | None:
    folder = getattr(logger, name, None)
    return None if folder is None else os.fsdecode(folder)  # raises if it is neither a text nor a path


def _local(root: str) -> Path | None:
    try:
        return local_folder(root)
    except ValueError:
        return None


def record_writers(
    trainer: "Trainer", guard: Guard, directory: Path, most_bytes: int | None = MOST_BYTES
) -> list[RecordWriter]:
    """Return the writers of the record: into files in ``directory``, whose old steps can be thinned.

    Where TensorBoard writes to another machine, such as ``s3://``, the record goes into its event file.

    Args:
        trainer: the Trainer, whose loggers are open.
        guard: says what a logger refuses.
        directory: the folder of the run.
        most_bytes: what the steps may take on the disk, see `FileRecord`. Default: 256 MiB.

    Raises:
        ValueError: a newer version of stabnorm, or another tool, has written there.
    """
    remote = [writer for writer in summary_writers(trainer, guard) if _local(os.fspath(writer.log_dir)) is None]
    if remote:
        return [TensorBoardRecord(writer) for writer in remote]
    try:
        return [FileRecord(directory, most_bytes)]
    except OSError as error:
        say("stabnorm: no record is written, because that is impossible in %s: %s", directory, cause(error))
        return [_LateRecord(directory, most_bytes)]


class _LateRecord:
    """A `FileRecord` whose folder could not be made when the training began; every flush tries again."""

    name = FileRecord.__name__

    def __init__(self, directory: Path, most_bytes: int | None) -> None:
        self._directory, self._most_bytes = directory, most_bytes

    @functools.cached_property
    def _record(self) -> FileRecord:
        return FileRecord(self._directory, self._most_bytes)

    def write_block(self, block: Block) -> None:
        self._record.write_block(block)

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        self._record.write_event(kind, step, data)

    def close(self) -> None:
        """Do nothing, like a FileRecord."""


def log_picture(
    trainer: "Trainer", guard: Guard, key: str, image: npt.NDArray[np.uint8], step: int, directory: Path
) -> None:
    """Log a picture with every logger that shows pictures; if none takes it, write a file to ``directory``."""
    taken = False
    for logger in trainer.loggers:
        what = f"{type(logger).__name__} cannot show pictures"
        if guard.attempt(what, shows_images, logger):
            taken |= guard.attempt(what, log_image, logger, key, image, step, directory) is not None
    if not taken:
        guard.attempt(f"no picture can be written to {directory}", log_image, None, key, image, step, directory)


def log_companion(
    trainer: "Trainer", guard: Guard, track: CompanionTrack, alerts: Sequence[Alert], directory: Path
) -> None:
    """Draw a heat map of row by step for each of a companion's statistics."""
    steps = track.history_steps().numpy()
    for statistic in track.statistics:
        values = track.history()[statistic.name].numpy()
        if not np.isnan(values).all():
            marks = [(alert.step, alert.layer) for alert in alerts if alert.statistic == statistic.name]
            picture = heatmap(values, steps, track.rows, f"{statistic.name} ({statistic.unit})", marks=marks)
            log_picture(trainer, guard, f"stability/{statistic.name}", picture, int(steps[-1]), directory)


def log_text(trainer: "Trainer", guard: Guard, key: str, markdown: str, step: int) -> None:
    """Log a Markdown text with TensorBoard."""
    for writer in summary_writers(trainer, guard):
        guard.attempt("TensorBoard cannot log texts", writer.add_text, key, markdown, step)


def headline_writers(
    trainer: "Trainer",
    guard: Guard,
    statistics: Sequence[str],
    alerts: Callable[[], int],
    overhead: Callable[[], float],
) -> list[RecordWriter]:
    """Return a writer of headlines for each logger, so that one that fails keeps nothing from the others."""
    for writer in summary_writers(trainer, guard):
        guard.attempt(
            "TensorBoard cannot arrange its charts", writer.add_custom_scalars, custom_scalars_layout(statistics)
        )
    return [HeadlineScalars(logger, statistics, alerts, overhead) for logger in trainer.loggers]


class HeadlineScalars:
    """A record writer that logs only a dozen numbers of every flush, as ordinary scalars of a logger.

    Args:
        logger: one of the Trainer's loggers.
        statistics: names of the watched statistics.
        alerts: returns the number of alerts so far.
        overhead: returns the monitor's cost so far, in percent of the step.
    """

    def __init__(
        self,
        logger: Any,
        statistics: Sequence[str],
        alerts: Callable[[], int],
        overhead: Callable[[], float],
    ) -> None:
        self._logger, self._statistics, self._alerts, self._overhead = logger, statistics, alerts, overhead

    @property
    def name(self) -> str:
        """What a warning calls it: the logger's class."""
        return type(self._logger).__name__

    def write_block(self, block: Block) -> None:
        """Log the scalars of a block at its last step; companions have pictures instead."""
        if block.companion:
            return
        separator = getattr(self._logger, "group_separator", "/")
        scalars = headline(
            block, self._statistics, alerts=self._alerts(), overhead=self._overhead(), separator=separator
        )
        self._logger.log_metrics(scalars, step=block.last_step)

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        """Do nothing, because an event is not a scalar."""

    def close(self) -> None:
        """Do nothing, because the Trainer closes the loggers."""


def alert_writers(trainer: "Trainer", guard: Guard) -> list[RecordWriter]:
    """Return a writer for each logger that can send its user an alert, as Weights & Biases by mail or Slack."""
    found = [
        guard.attempt(f"{type(one).__name__} tells nothing of its alerts", _alert_of, one) for one in trainer.loggers
    ]
    return [LoggerAlerts(alert) for alert in found if alert is not None]


def _alert_of(logger: Any) -> Callable[..., Any] | None:
    alert = getattr(getattr(logger, "experiment", None), "alert", None)
    return alert if callable(alert) else None


class LoggerAlerts:
    """A record writer that hands alarms to a logger's own alert: one for each onset, when it begins.

    Args:
        alert: sends one, called with `title` and `text`.
    """

    name = "the logger's own alert"

    def __init__(self, alert: Callable[..., Any]) -> None:
        self._alert = alert
        self._last = -1

    def write_block(self, block: Block) -> None:
        """Do nothing, because a block is no alert."""

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        """Send an onset that is new."""
        if kind == "onset" and step > self._last:
            self._alert(title=f"stabnorm: {data['sentence']}", text=f"{data['advice']} {data['remedy']}")
            self._last = step

    def close(self) -> None:
        """Do nothing, because an alert is sent at once."""
