"""`FlightRecorder`: keep what it takes to run a step again, and write it when something goes wrong."""

import contextlib
import copy
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

import stabnorm
from stabnorm._checks import check_count, check_function, check_instance
from stabnorm._models.devices import device_of
from stabnorm._models.hooks import uncounted
from stabnorm._models.intact import put_back
from stabnorm._models.masks import valid_tokens
from stabnorm._models.random_state import random_state_kept
from stabnorm._models.ranks import is_distributed
from stabnorm.actions.actions import kind_of
from stabnorm.actions.snapshot import random_state, restore_random_state
from stabnorm.monitor._folders import file_name, local_folder
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.monitor.outputs import cause, say
from stabnorm.recorder.batch_rows import AgainstPast, BatchRows, look_at_rows
from stabnorm.recorder.detail import Detail, history_of
from stabnorm.recorder.dump import STEP, WEIGHTS, write_dump
from stabnorm.recorder.kept_batch import on_host, size_of, unshared

LossOfBatch = Callable[[nn.Module, Any], Tensor | None]
_REST = 100  # steps from one dump to the next one
_LOSSES = 256  # of the last steps, which tell what was usual before an alarm


class _Kept(NamedTuple):
    """The batches of a step that is over."""

    step: int
    size: int  # in bytes
    batches: list[dict[str, Any]]


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
        batch_bytes: the largest size of the batches that are kept, and of those of a step in a dump. Default: 64 MiB.
        weight_bytes: the largest size of the weights; larger ones are left out, and a checkpoint takes their place when
            the step is run again. Default: 256 MiB.
        times: the largest number of dumps. Default: 3.
        loss: computes the loss from (model, batch) as the loop does, and calls no ``backward()``; None where a batch
            has none. Default: none, and the rows of a batch are compared when it is run again.
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
        loss: LossOfBatch | None = None,
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
        if loss is not None:
            check_function("loss", loss, "model", "batch")
        self.monitor, self.folder, self.loss = monitor, local_folder(folder), loss
        self.steps, self.times = steps, times
        self.batch_bytes, self.weight_bytes = batch_bytes, weight_bytes
        self.about = dict(about or {})
        self.dumps: list[Path] = []
        self._batches: list[dict[str, Any]] = []  # of the open step
        self._recent = deque[_Kept]()  # of the steps before it
        self._open = self._begun = False  # is a step open, and has there been one
        self._losses = deque[tuple[int, Tensor | float]](maxlen=max(steps, _LOSSES))
        self._alarmed: list[dict[str, Any]] = []  # the batches of the step that the alarm is about
        self._why: dict[str, Any] | None = None  # of the dump that is due
        self._capsule: dict[str, Any] | None = None  # weights and states from before the open step
        self._onsets, self._last = len(monitor.onsets), -_REST
        self._detail = Detail(monitor, detail_steps)
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
        if not self._begun:
            return  # it failed before the first batch, so there is nothing to keep
        self._why = {"kind": "sigterm" if terminated else "exception", "reason": cause(error), "layer": ""}
        if self._open and self._capsule is None:
            self._keep()
        self._write()

    def close(self) -> None:
        """Write what is still due."""
        self._ended = True
        if self._why is not None:
            self._write()
        self._detail.finish(self._losses)

    # -- a step --------------------------------------------------------------------------------------------------------

    def begin(self, batch: Any, *, indices: Sequence[int] | None = None, masks: Sequence[Tensor] = ()) -> None:
        """Take in a batch before its forward; with gradient accumulation each micro-batch of the step.

        Args:
            batch: the batch; its containers are copied, its tensors are not.
            indices: where its rows are in the data set. Default: not known.
            masks: the masks of valid tokens that are open in its forward. Default: none.
        """
        if not self._open:
            self._batches = []
            self._open = self._begun = True
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
            self._compare_rows(self.monitor.steps_done, self._batches, layer)

    def end(self, loss: Tensor | float | None = None) -> None:
        """End a step, after `monitor.step`.

        Args:
            loss: its loss, which is not read before a dump. Default: not known.
        """
        if loss is not None:
            self._losses.append((self.monitor.steps_done - 1, loss.detach() if isinstance(loss, Tensor) else loss))
        self._remember()
        self._open = False
        if self._capsule is not None:
            self._write()
        else:
            self._detail.follow(self._losses)
        onsets = self.monitor.onsets[self._onsets :]
        self._onsets += len(onsets)
        if onsets and self._why is None and self._due() and self.monitor.speaks:
            last = onsets[-1]
            self._why = {"kind": kind_of(last), "reason": str(last), "layer": last.layer, "onset": last.as_dict()}
            self._compare_rows(last.step, self._batches_of(last.step), last.layer)
        self._batches = []

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

    # -- the rows of a batch -------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        """Keep the batches of the step that ends, and forget older ones that do not fit any more."""
        if len(self.dumps) < self.times:
            kept = [{**one, "batch": unshared(one["batch"])} for one in self._batches]
            size = sum(size_of(one["batch"]) for one in kept)
            self._recent.append(_Kept(self.monitor.steps_done - 1, size, kept))
        while self._recent and (len(self.dumps) >= self.times or len(self._recent) > self.steps or self._too_much()):
            self._recent.popleft()

    def _too_much(self) -> bool:
        return sum(kept.size for kept in self._recent) > self.batch_bytes

    def _batches_of(self, step: int) -> list[dict[str, Any]]:
        return next((kept.batches for kept in self._recent if kept.step == step), [])

    def _compare_rows(self, step: int, batches: list[dict[str, Any]], layer: str) -> None:
        """Say which rows of a step's batches did what the alarm tells."""
        assert self._why is not None
        self._why["alarm_step"] = step
        self._alarmed = batches
        what = "the rows of the batch cannot be compared"
        past = self.monitor.outputs.attempt(what, self._against_past, step)
        if past is None:
            return
        self._why["against_past"] = past._asdict()
        if self.loss is None or not batches or _ranks() > 1:
            return
        rows = self.monitor.outputs.attempt(what, self._rows_now, step, batches, layer, past)
        if rows is not None:
            self._why["rows"] = rows.as_dict()
            say("stabnorm, step %s: %s", step, rows.sentence)
            self.monitor.outputs.write_event(self.monitor.records, "rows", step, rows.as_dict())

    def _rows_now(self, step: int, batches: list[dict[str, Any]], layer: str, past: AgainstPast) -> BatchRows | None:
        """Run batches again, in the middle of a training, which does not notice."""
        model, loss = self.monitor.model, self.loss
        assert loss is not None

        def run(one: Mapping[str, Any]) -> Tensor | None:
            restore_random_state(one["random"])
            with valid_tokens(*one["masks"]) if one["masks"] else contextlib.nullcontext():
                return loss(model, copy.copy(one["batch"]))

        eager = torch.compiler.set_stance("force_eager")  # a compiled graph would be compiled again for our hooks
        with put_back(model), uncounted(), random_state_kept(device_of(model)), eager:
            return look_at_rows(model, self.monitor.norms, batches, run, step=step, named=layer, past=past)

    def _against_past(self, step: int) -> AgainstPast:
        """Compare a step with those before it, of which a dump may have too few."""
        steps, series = self.monitor.history_so_far()
        numbers, losses = steps[-_LOSSES:].numpy(), dict(self._losses)
        known = np.array([float(losses.get(int(number), np.nan)) for number in numbers], np.float32)
        largest = series["amax"][-_LOSSES:].numpy() if "amax" in series else None
        return AgainstPast.of(step, numbers, known, largest, self.monitor.layers)

    # -- a dump --------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write the dump that is due."""
        why, self._why = self._why, None
        assert why is not None
        if len(self.dumps) >= self.times:
            return
        self._last = self.monitor.steps_done
        written = self.monitor.outputs.attempt("no dump is written", self._write_now, why)
        self._capsule, self._alarmed = None, []
        if written is not None:
            folder, use = written
            self.dumps.append(folder)
            say("stabnorm: a dump of step %s is in %s; %s", why["step"], folder, use)
            what = "the steps after a dump are not recorded in full"
            if not self._ended:
                self.monitor.outputs.attempt(what, self._detail.begin, folder)

    def _write_now(self, why: dict[str, Any]) -> tuple[Path, str]:
        """Write it, and return the folder and what it is good for."""
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
            alarm = self._alarm_kept(why)
            tensors[STEP] = {
                "batches": kept, "monitor": capsule["monitor"], "training": capsule["training"], "alarm": alarm
            }  # fmt: skip
        rank = torch.distributed.get_rank() if _ranks() > 1 else 0
        name = file_name(f"step{step:08d}-{why['kind']}") + (f"-rank{rank}" if rank else "")
        folder = write_dump(self.folder / name, header, history_of(monitor, self.steps, self._losses), tensors)
        if STEP not in tensors:
            return folder, f"it has the last steps, but none to run again: {header['no_batch'] or header['no_weights']}"
        if WEIGHTS not in tensors:
            needed = f"`stabnorm replay {folder} --checkpoint FILE` runs it again"
            return folder, f"{needed}; its weights are left out: {header['no_weights']}"
        return folder, f"`stabnorm replay {folder}` runs it again"

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
        size = sum(size_of(one["batch"]) for one in self._batches)
        if size > self.batch_bytes:
            return [], f"they have {size:,} bytes, and batch_bytes is {self.batch_bytes:,}"
        return [on_host(one) for one in self._batches], ""

    def _alarm_kept(self, why: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the batches of the step that an alarm is about; None if they are those of the dump's own step."""
        if not self._alarmed or why.get("alarm_step", why["step"]) == why["step"]:
            return None
        return {"step": why["alarm_step"], "batches": [on_host(one) for one in self._alarmed]}


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _ranks() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
