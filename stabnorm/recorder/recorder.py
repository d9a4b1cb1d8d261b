"""`FlightRecorder`: keep what it takes to run a step again, and write it when something goes wrong."""

import copy
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

import stabnorm
from stabnorm._checks import check_count, check_instance
from stabnorm._models.ranks import is_distributed
from stabnorm.actions.actions import kind_of
from stabnorm.actions.snapshot import random_state
from stabnorm.monitor._folders import file_name, local_folder
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.monitor.outputs import cause, say
from stabnorm.recorder.dump import STEP, WEIGHTS, add_detail, write_dump

_REST = 100  # steps from one dump to the next one


class FlightRecorder:
    """Writes the last steps of a run, and what it takes to run one of them again, when an alarm fires or the run dies.

    The step that can be run again is the one that fails, where this is known before the optimizer changes the weights:
    an exception, SIGTERM, or a bad verdict, see `Actions`. At an alarm, which comes later, it is the next one. As long
    as nothing happens it keeps the batch of the open step and its random states, and copies nothing. It writes no dump
    within 100 steps of the last one, and nothing of it can end a training.

    Use it as a context manager around the loop, after the monitor's. Call `begin` before each forward with its batch,
    and `end` after `monitor.step`.

    Args:
        monitor: the run's monitor.
        folder: where the dumps come to.
        steps: how many of the last steps a dump holds. Default: 64.
        detail_steps: for how many steps after a dump the whole catalogue is recorded. Default: 8.
        batch_bytes: the largest size of a step's batches; larger ones are left out. Default: 64 MiB.
        weight_bytes: the largest size of the weights; larger ones are left out, and a checkpoint takes their place when
            the step is run again. Default: 256 MiB.
        times: the largest number of dumps. Default: 3.
        about: what else `dump.json` says, as plain containers. Default: nothing.

    Attributes:
        dumps: the folders that were written.

    Raises:
        TypeError: an argument has another type.
        ValueError: a number is out of range, or the folder is not on this machine.

    >>> import tempfile
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> with tempfile.TemporaryDirectory() as folder, StabilityMonitor(model) as monitor:
    ...     recorder = FlightRecorder(monitor, folder)
    ...     try:
    ...         with recorder:
    ...             recorder.begin(torch.randn(2, 4))
    ...             raise RuntimeError("the loss function fails")
    ...     except RuntimeError:
    ...         print(recorder.dumps[0].name)
    step00000000-exception
    """

    def __init__(
        self,
        monitor: StabilityMonitor,
        folder: str | os.PathLike[str],
        *,
        steps: int = 64,
        detail_steps: int = 8,
        batch_bytes: int = 64 << 20,
        weight_bytes: int = 256 << 20,
        times: int = 3,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        check_instance("monitor", monitor, StabilityMonitor, "a StabilityMonitor")
        numbers = {"steps": steps, "times": times}
        for name, value in numbers.items():
            check_count(name, value)
        for name, value in {
            "detail_steps": detail_steps,
            "batch_bytes": batch_bytes,
            "weight_bytes": weight_bytes,
        }.items():
            check_count(name, value, 0)
        self.monitor, self.folder = monitor, local_folder(folder)
        self.steps, self.detail_steps, self.times = steps, detail_steps, times
        self.batch_bytes, self.weight_bytes = batch_bytes, weight_bytes
        self.about = dict(about or {})
        self.dumps: list[Path] = []
        self._batches: list[dict[str, Any]] = []  # of the open step
        self._open = False
        self._losses = deque[tuple[int, Tensor | float]](maxlen=steps)
        self._why: dict[str, Any] | None = None  # of the dump that is due
        self._capsule: dict[str, Any] | None = None  # weights and states from before the open step
        self._onsets, self._last = len(monitor.onsets), -_REST
        self._detail: tuple[Path, StabilityMonitor, int] | None = None
        self._handler: Any = None
        self._ended = False

    # -- around a training ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Let SIGTERM end the process as an exception does, unless the program has arranged something itself."""
        first_thread = threading.current_thread() is threading.main_thread()
        if first_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._handler = signal.signal(signal.SIGTERM, _terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None
        if error is not None and not isinstance(error, KeyboardInterrupt):
            self.crashed(error)
        self.close()

    def crashed(self, error: BaseException) -> None:
        """Write a dump, because the run ends with an error."""
        self._ended, terminated = True, isinstance(error, SystemExit)
        self._why = {"kind": "sigterm" if terminated else "exception", "reason": cause(error), "layer": ""}
        if self._open and self._capsule is None:
            self._keep()
        self._write()

    def close(self) -> None:
        """Write what is still due."""
        self._ended = True
        if self._why is not None:
            self._write()
        self._finish_detail()

    # -- a step --------------------------------------------------------------------------------------------------------

    def begin(self, batch: Any, *, indices: Sequence[int] | None = None, masks: Sequence[Tensor] = ()) -> None:
        """Take in a batch before its forward; with gradient accumulation each micro-batch of the step.

        Args:
            batch: the batch; its containers are copied, its tensors are not.
            indices: where its rows are in the data set. Default: not known.
            masks: the masks of valid tokens that are open in its forward. Default: none.
        """
        if not self._open:
            self._batches.clear()
            self._open = True
            self._capsule = None
            if self._why is not None:
                self._keep()
        rows = None if indices is None else [int(index) for index in indices]
        self._batches.append(
            {"batch": copy.copy(batch), "indices": rows, "masks": list(masks), "random": random_state()}
        )

    def alarm(self, kind: str, reason: str, layer: str = "") -> None:
        """Say that the open step is bad, before the optimizer has changed anything; `end` then writes a dump."""
        if self._due():
            self._why = {"kind": kind, "reason": reason, "layer": layer}
            self._keep()

    def end(self, loss: Tensor | float | None = None) -> None:
        """End a step, after `monitor.step`.

        Args:
            loss: its loss, which is not read before a dump. Default: not known.
        """
        if loss is not None:
            self._losses.append((self.monitor.steps_done - 1, loss.detach() if isinstance(loss, Tensor) else loss))
        self._open = False
        if self._capsule is not None:
            self._write()
        elif self._detail is not None:
            self._follow_detail()
        onsets = self.monitor.onsets[self._onsets :]
        self._onsets += len(onsets)
        if onsets and self._why is None and self._due() and self.monitor.speaks:
            last = onsets[-1]
            self._why = {"kind": kind_of(last), "reason": str(last), "layer": last.layer, "onset": last.as_dict()}
        self._batches.clear()

    def _due(self) -> bool:
        return len(self.dumps) < self.times and self.monitor.steps_done - self._last >= _REST

    def _keep(self) -> None:
        """Copy what a step changes, before it does."""
        self._capsule = self.monitor.outputs.attempt("a step cannot be kept for a dump", self._capsule_now)

    def _capsule_now(self) -> dict[str, Any]:
        model = self.monitor.model
        capsule: dict[str, Any] = {
            "monitor": self.monitor.state_dict(),
            "training": [name for name, module in model.named_modules() if module.training],
        }
        tensors = model.state_dict()
        size = sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, Tensor))
        if size > self.weight_bytes:
            capsule["no_weights"] = f"they have {size:,} bytes, and weight_bytes is {self.weight_bytes:,}"
        elif any(is_distributed(t) for t in tensors.values() if isinstance(t, Tensor)):
            capsule["no_weights"] = "this process has only a part of them"
        else:
            capsule["weights"] = {
                name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
                for name, value in tensors.items()
            }
        return capsule

    # -- a dump --------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write the dump that is due."""
        why, self._why = self._why, None
        assert why is not None
        if len(self.dumps) >= self.times:
            return
        self._last = self.monitor.steps_done
        folder = self.monitor.outputs.attempt("no dump is written", self._write_now, why)
        self._capsule = None
        if folder is not None:
            self.dumps.append(folder)
            say("stabnorm: a dump of step %s is in %s; `stabnorm replay %s` runs it again", why["step"], folder, folder)
            what = "the steps after a dump are not recorded in full"
            self.monitor.outputs.attempt(what, self._begin_detail, folder)

    def _write_now(self, why: dict[str, Any]) -> Path:
        monitor, capsule = self.monitor, self._capsule or {}
        closed = not self._open  # the open step has no figures of its own
        why["step"] = step = monitor.steps_done - closed
        tensors: dict[str, dict[str, Any]] = {}
        header: dict[str, Any] = {
            **why, **self.about, **self._describe(), "complete_step": closed,
            "no_weights": capsule.get("no_weights", "" if "weights" in capsule else "the step was not kept"),
        }  # fmt: skip
        if "weights" in capsule:
            tensors[WEIGHTS] = capsule["weights"]
        kept, header["no_batch"] = self._kept_batches()
        header["indices"] = [one["indices"] for one in self._batches]
        if capsule and kept:
            tensors[STEP] = {"batches": kept, "monitor": capsule["monitor"], "training": capsule["training"]}
        rank = torch.distributed.get_rank() if _ranks() > 1 else 0
        name = file_name(f"step{step:08d}-{why['kind']}") + (f"-rank{rank}" if rank else "")
        return write_dump(self.folder / name, header, self._history(monitor), tensors)

    def _describe(self) -> dict[str, Any]:
        monitor = self.monitor
        return {
            "stabnorm": stabnorm.__version__,
            "torch": torch.__version__,
            "ranks": _ranks(),
            "layers": list(monitor.layers),
            "statistics": [statistic.name for statistic in monitor.statistics],
        }

    def _kept_batches(self) -> tuple[list[dict[str, Any]], str]:
        """Return the batches of the step on the host, and why there are none."""
        if not self._batches:
            return [], "no step was open"
        size = sum(_size(one["batch"]) for one in self._batches)
        if size > self.batch_bytes:
            return [], f"they have {size:,} bytes, and batch_bytes is {self.batch_bytes:,}"
        return [_on_host(one) for one in self._batches], ""

    def _history(self, monitor: StabilityMonitor) -> dict[str, Any]:
        steps, series = monitor.history_so_far()
        arrays: dict[str, Any] = {"@steps": steps[-self.steps :].numpy()}
        arrays |= {name: values[-self.steps :].numpy() for name, values in series.items()}
        for track in monitor.companions.values():
            arrays[f"{track.name}/@rows"] = np.array(track.rows, str)
            _, series = monitor.history_so_far(track.name)
            arrays |= {f"{track.name}/{name}": values[-self.steps :].numpy() for name, values in series.items()}
        losses = dict(self._losses)
        arrays["loss"] = np.array([float(losses.get(int(step), np.nan)) for step in arrays["@steps"]], np.float32)
        return arrays

    # -- the steps after it --------------------------------------------------------------------------------------------

    def _begin_detail(self, folder: Path) -> None:
        if not self.detail_steps or self._ended:
            return
        layers = [f"^{re.escape(name)}$" for name in self.monitor.layers]
        full = StabilityMonitor(self.monitor.model, "full", include=layers, flush_every=self.detail_steps, sync=False)
        full.mute()  # its alerts are those of the other monitor
        full.steps_done = self.monitor.steps_done
        full.attach()
        self._detail = (folder, full, self.monitor.steps_done + self.detail_steps)

    def _follow_detail(self) -> None:
        assert self._detail is not None
        _, full, until = self._detail
        self.monitor.outputs.attempt("the steps after a dump are not recorded in full", full.step)
        if self.monitor.steps_done >= until:
            self._finish_detail()

    def _finish_detail(self) -> None:
        if self._detail is None:
            return
        (folder, full, _), self._detail = self._detail, None
        attempt = self.monitor.outputs.attempt
        attempt("a monitor cannot be taken off", full.detach)
        if full.steps_done:
            attempt("the steps after a dump cannot be written", lambda: add_detail(folder, self._history(full)))


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _ranks() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _size(value: Any) -> int:
    """Return the bytes of the tensors in a batch."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return sum(map(_size, parts))


def _on_host(value: Any) -> Any:
    """Return a batch with its tensors on the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_host(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return tuple(_on_host(part) for part in value)
    if isinstance(value, tuple | list):
        return type(value)(_on_host(part) for part in value)
    return value
