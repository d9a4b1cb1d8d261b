"""The flight recorder of a Lightning training: how its model is built, and which rows a batch has."""

import functools
import inspect
import operator
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils.data import BatchSampler

from stabnorm.callbacks._outputs import shared_directory
from stabnorm.callbacks._trainer import loss_again
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.recorder.recorder import FlightRecorder

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

FOLDER = "dumps"
_AHEAD = 4096  # batches that a loader may ask for ahead of time
_PLAIN = (bool, int, float, str, type(None))
_AUTOCAST = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}


def recorder_of(
    trainer: "Trainer", pl_module: "LightningModule", monitor: StabilityMonitor, times: int
) -> FlightRecorder | None:
    """Return the recorder of a fit that begins; None if none is asked for, or nothing is to be written."""
    directory = shared_directory(trainer)
    if not times or directory is None:
        return None
    about = {
        "model": recipe_of(pl_module),
        "autocast": _AUTOCAST.get(str(trainer.precision), ""),
        "micro_batches": trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1,
    }
    loss = functools.partial(_loss_of, trainer) if pl_module.automatic_optimization else None
    return FlightRecorder(monitor, directory / FOLDER, times=times, loss=loss, about=about)


def _loss_of(trainer: "Trainer", model: Any, batch: Any) -> Tensor | None:
    return loss_again(trainer, model, batch, getattr(trainer.fit_loop, "batch_idx", 0))()


def recipe_of(pl_module: "LightningModule") -> dict[str, Any]:
    """Say how the module is built: its class, and its hyperparameters; or, as "unknown", why nobody can know."""
    cls, hyperparameters = type(pl_module), dict(getattr(pl_module, "hparams", {}))
    unknown = _why_unknown(cls, hyperparameters)
    if unknown:
        return {"unknown": unknown}
    recipe: dict[str, Any] = {"module": cls.__module__, "class": cls.__qualname__, "hyperparameters": hyperparameters}
    if cls.__module__ == "__main__":
        main: Any = sys.modules["__main__"]
        if getattr(main, "__spec__", None) is not None:  # python -m package.module
            recipe["module"] = main.__spec__.name
        elif getattr(main, "__file__", None):
            recipe["file"] = str(Path(main.__file__).resolve())
        else:
            return {"unknown": f"{cls.__name__} was written in an interactive session"}
    return recipe


def _why_unknown(cls: type[Any], hyperparameters: dict[str, Any]) -> str:
    """Say why a class cannot be built again from hyperparameters; "" if it can be, as far as they tell."""
    if "<locals>" in cls.__qualname__:
        return f"the class {cls.__name__} is defined inside a function"
    if not _is_plain(hyperparameters):
        return "its hyperparameters are no plain numbers and texts"
    try:
        inspect.signature(cls).bind(**hyperparameters)
    except TypeError as error:
        return f"save_hyperparameters() does not hold the arguments of {cls.__name__}: {error}"
    except ValueError:  # it has no signature
        return ""
    return ""


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


class BatchIndices:
    """Notes which rows of the data set each batch has, where torch's `BatchSampler` chooses them.

    Lightning asks for the first batches before a callback can look at the loader, so the class is followed while a fit
    goes on. A loader with workers asks ahead of time and in order: what was noted first belongs to the next batch.
    """

    def __init__(self) -> None:
        self._noted: WeakKeyDictionary[BatchSampler, deque[list[Any]]] = WeakKeyDictionary()
        self._own: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchIndices, ()  # a copy notes for itself

    def attach(self) -> None:
        """Begin to note."""
        self.detach()
        noted, own = self._noted, BatchSampler.__iter__

        def noting(sampler: BatchSampler) -> Iterator[list[Any]]:
            rows = noted[sampler] = deque(maxlen=_AHEAD)
            for batch in own(sampler):
                rows.append(list(batch))
                yield batch

        self._own, self._noting = own, noting
        BatchSampler.__iter__ = noting  # type: ignore[method-assign]

    def detach(self) -> None:
        """Give the class its own method back."""
        if self._own is not None and BatchSampler.__iter__ is self._noting:
            BatchSampler.__iter__ = self._own  # type: ignore[method-assign]
        self._own = None

    def next(self, trainer: "Trainer") -> list[int] | None:
        """Return the rows of the batch that begins; None if they are not known."""
        sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
        rows = self._noted.get(sampler) if isinstance(sampler, BatchSampler) else None
        try:
            return [operator.index(row) for row in rows.popleft()] if rows else None
        except TypeError:  # an `IterableDataset` has no rows, and a sampler may choose by keys that are no numbers
            return None
