"""`Schedule` decides at which steps something costly is measured."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stabnorm._models.async_copy import AsyncCopy
from stabnorm._models.ranks import gather_in_group, ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BUDGET = 0.02  # share of the training's time
_LEAST = 5  # steps between two samples: more samples warn hardly earlier
_START = 50  # steps between two samples until their cost is known
_CLOSE = 6  # samples that follow so soon after one that is near its bound


class Schedule:
    """Measures at every n-th step, or as often as 2 % of the training's time allows.

    After a sample above `near` it looks closer: until six samples in a row are below, the next one comes after five
    steps. Seconds and value of a sample are read these five steps later, when a GPU has long done its work. All
    processes take the longest interval of any of them, because they must measure at the same steps.

    Args:
        every: the interval; None for the budget.
        near: the value above which it looks closer.
    """

    def __init__(self, every: int | None, near: float) -> None:
        self.every, self.near = every, near
        self._interval = _START if every is None else every
        self._step = 0
        self._next = _LEAST if every is None else every - 1
        self._bare_steps: deque[float] = deque(maxlen=128)  # seconds of the steps without a sample
        self._last_end: float | None = None
        self._timer: _Timer | None = None
        self._measured_at: int | None = None
        self._value: AsyncCopy | None = None  # of the last sample, until it is read
        self._close = 0  # samples that still come soon

    @property
    def due(self) -> bool:
        """Whether to measure in this step."""
        return self._step >= self._next

    @contextmanager
    def sample(self, device: torch.device) -> Iterator[None]:
        """Measure the time of a sample, and wait for the next one."""
        timer = _Timer(device)
        try:
            yield
        finally:
            timer.stop()
            self._timer, self._measured_at = timer, self._step
            self.postpone()

    def see(self, sample: Tensor) -> None:
        """Take the value of the sample, a single number; all processes have the same one."""
        self._value = AsyncCopy(sample.detach().reshape(()))

    def postpone(self) -> None:
        """Wait for the next sample."""
        self._next = self._step + self._interval

    def end_step(self, merged_over: "bool | ProcessGroup") -> None:
        """Count a step; once the cost of the last sample is known, find the interval that the budget allows.

        Args:
            merged_over: the processes that measure together: False, True for all of them, or a process group.
        """
        now, sampled = time.perf_counter(), self._measured_at == self._step
        if self._last_end is not None and not sampled:
            self._bare_steps.append(now - self._last_end)
        self._last_end = now
        self._step += 1
        if self._measured_at is None or self._step != self._measured_at + _LEAST:
            return
        if self.every is None and self._timer is not None:
            self._interval = self._affordable(self._timer.seconds(), merged_over)
            self._timer = None
        if self._value is not None:
            near = bool(self._value.wait()[0] > self.near)
            self._close = _CLOSE if near else max(0, self._close - 1)
            self._value = None
        self._next = self._measured_at + (min(_LEAST, self._interval) if self._close else self._interval)

    def _affordable(self, seconds: float, merged_over: "bool | ProcessGroup") -> int:
        step = max(float(np.median(self._bare_steps)), 1e-9)
        interval = max(_LEAST, math.ceil(seconds / (_BUDGET * step)))
        group = None if isinstance(merged_over, bool) else merged_over
        if merged_over and ranks(group) > 1:
            interval = int(gather_in_group(torch.tensor([interval], device="cpu"), group).max())
        return interval

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, when the next sample is due, and what decides about it."""
        value = None if self._value is None else float(self._value.wait()[0])
        return {
            "step": self._step, "next": self._next, "interval": self._interval, "close": self._close,
            "measured_at": self._measured_at, "value": value,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; an interval that was given stays."""
        self._step, self._next = int(state["step"]), int(state["next"])
        self._close, self._measured_at = int(state.get("close", 0)), state.get("measured_at")
        value = state.get("value")
        self._value = None if value is None else AsyncCopy(torch.tensor(value, device="cpu"))
        if self.every is None:
            self._interval = int(state["interval"])


class _Timer:
    """Measures seconds, on a GPU those of its work."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._seconds, self._began = 0.0, time.perf_counter()
        self._mark()

    def _mark(self) -> None:
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()

    def stop(self) -> None:
        """End the measurement."""
        self._mark()
        self._seconds = time.perf_counter() - self._began

    def seconds(self) -> float:
        """Return the seconds; on a GPU this waits for the work that was measured."""
        if not self._events:
            return self._seconds
        first, last = self._events
        last.synchronize()
        return max(self._seconds, 1e-3 * float(first.elapsed_time(last)))
