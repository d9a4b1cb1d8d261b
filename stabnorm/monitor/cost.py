"""What monitoring costs, measured on the host."""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np

_INTERVALS = 128  # step durations for the median, which ignores a validation pass between two steps


@dataclass(frozen=True)
class Cost:
    """What monitoring costs, in milliseconds per step on the host, and as a share of the step without it.

    In a compiled model the hooks' share is inside the graph, and on a GPU their kernels run behind the host's back:
    both are not in here; an A/B run measures them. With `fused` the hooks' time has the forwards of the norms that run
    in one pass with what watches them.
    """

    hooks: float
    step: float
    flush: float
    percent: float

    def __str__(self) -> str:
        total = self.hooks + self.step + self.flush
        if np.isnan(total):
            return "unknown: too few steps to say"
        return (
            f"{total:.2f} ms per step ({self.percent:.1f} %): hooks {self.hooks:.2f}, step {self.step:.2f}, "
            f"flush {self.flush:.2f}"
        )


class Stopwatch:
    """Measures the seconds in steps, in flushes and between them. The hooks measure their own time."""

    def __init__(self) -> None:
        self.steps = self.flushes = 0.0
        self._count = 0
        self._bare_steps: deque[float] = deque(maxlen=_INTERVALS)  # durations, less what monitoring took of them
        self._last_step: tuple[float, float] | None = None  # when it was, and the seconds spent until then
        self._first_step = (0.0, 0.0, 0.0)  # spent in the first step, which allocates and is left out

    def begin_step(self, hooks: float) -> float:
        """Note that a step begins, with so many seconds spent in hooks so far; return the time."""
        now, spent = time.perf_counter(), hooks + self.steps + self.flushes
        if self._last_step is not None:
            at, before = self._last_step
            self._bare_steps.append(now - at - (spent - before))
        self._last_step = now, spent
        self._count += 1
        return now

    def end_step(self, began: float, hooks: float) -> None:
        """Note that the step is over."""
        self.steps += time.perf_counter() - began
        if self._count == 1:
            self._first_step = (hooks, self.steps, self.flushes)

    @property
    def bare(self) -> float:
        """Seconds of a usual step, without what monitoring took of it; NaN before the second step."""
        return float(np.median(self._bare_steps)) if self._bare_steps else float("nan")

    @property
    def flush(self) -> float:
        """Seconds that flushes took per step."""
        return self.flushes / max(self._count, 1)

    def cost(self, hooks: float) -> Cost:
        """The cost per step, without the first step."""
        steps = self._count - 1
        if steps < 1:
            return Cost(*[float("nan")] * 4)
        spent = (hooks, self.steps, self.flushes)
        each = [1e3 * (now - first) / steps for now, first in zip(spent, self._first_step, strict=True)]
        percent = 0.1 * sum(each) / self.bare
        return Cost(hooks=each[0], step=each[1], flush=each[2], percent=percent)
