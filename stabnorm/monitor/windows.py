"""The past of many series at once, on the device: a window of logarithms, its median and robust scale, and scores.

Nothing here reads a value from the device. When a median is computed again depends only on the number of steps.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from stabnorm.monitor.baseline import ARMED, CLIP, LEARNT, PAST, REFRESH


class Span(NamedTuple):
    """How a window looks at the past.

    Attributes:
        every: steps between two values that it takes.
        size: values in the window.
        refresh: values between two looks at median and scale.
        learnt: values before the first look.
        armed: values before a score may raise an alert.
        again: the same after a change that was announced.
    """

    every: int
    size: int
    refresh: int
    learnt: int
    armed: int
    again: int


FAST = Span(1, PAST, REFRESH, LEARNT, ARMED, 64)
SLOW = Span(16, 64, 4, 16, 32, 16)  # sees a slow drift, which the fast window follows: armed after 512 steps


class Window:
    """Compares series with their own past.

    Args:
        span: which past.
        floors: ``[K]``, the least scale of each column, in log units.
        upward: ``[K]`` bool: only a rise counts in this column.
        rows: number of rows.

    Shape: everything has the shape ``[rows, K]``; the ring of values is ``[rows, K, span.size]``.

    >>> window = Window(FAST, torch.tensor([0.1]), torch.tensor([False]), 1)
    >>> scores = [window.score(torch.full((1, 1), 0.0 if step < 300 else 1.0)).item() for step in range(302)]
    >>> [round(score, 3) for score in scores[298:]]
    [0.0, 0.0, 5.0, 10.0]
    """

    STATE = ("ring", "center", "scale", "before", "seen", "held")

    def __init__(self, span: Span, floors: Tensor, upward: Tensor, rows: int) -> None:
        shape = (rows, len(floors))
        self.span, self.steps = span, 0
        self._floors, self._upward = floors, upward
        self.ring = torch.full((*shape, span.size), torch.nan, dtype=torch.float32, device=floors.device)
        self.center, self.before = (torch.zeros(shape, dtype=torch.float32, device=floors.device) for _ in range(2))
        self.scale = torch.ones_like(self.center)
        self.seen = torch.zeros_like(self.center)  # values of each series, because a layer may start late
        self.held = torch.full_like(self.center, torch.nan)  # the last score, for the steps that are not taken

    def to(self, device: torch.device) -> Self:
        """Move everything to a device."""
        if self.ring.device != device:
            for name in (*self.STATE, "_floors", "_upward"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def score(self, log: Tensor, exempt: Tensor | None = None) -> Tensor:
        """Take in the next step, and return by how many robust standard deviations it is off.

        The score must hold for two values, or be twice as high. It is NaN until the window is armed, and keeps its
        value at steps that the window does not take.

        Args:
            log: ``[rows, K]``, logarithms; what is not finite is no value.
            exempt: ``[rows, K]`` bool, what scores nothing. Default: nothing is exempt.
        """
        step, self.steps = self.steps, self.steps + 1
        if step % self.span.every:
            return self.held
        step //= self.span.every
        if step >= self.span.learnt and (step - self.span.learnt) % self.span.refresh == 0:
            self._refresh()
        known = torch.isfinite(log)
        off = (log - self.center) / self.scale
        learning = ~known | torch.isnan(off) | (self.seen < self.span.learnt)
        clipped = torch.where(learning, log, self.center + off.clamp(-CLIP, CLIP) * self.scale)  # outliers stay out
        self.ring[..., step % self.span.size] = torch.where(known, clipped, torch.nan)
        off = torch.where(self._upward, off.clamp(min=0), off.abs())
        now = off.masked_fill(learning if exempt is None else learning | exempt, 0)
        held = torch.maximum(torch.minimum(now, self.before), now / 2)
        self.before = now
        self.held = torch.where(self.seen >= self.span.armed, held, torch.nan)
        self.seen = self.seen + known
        return self.held

    def _refresh(self) -> None:
        self.center = _median(self.ring)
        spread = 1.4826 * _median((self.ring - self.center[..., None]).abs())
        self.scale = torch.maximum(spread, self._floors)

    def forget(self) -> None:
        """Learn again what is usual, because something was changed on purpose."""
        self.ring = torch.full_like(self.ring, torch.nan)
        self.center = torch.full_like(self.center, torch.nan)  # until the next look, nothing is clipped
        self.seen = self.seen.clamp(max=self.span.armed - self.span.again)
        self.held = torch.full_like(self.held, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain containers."""
        return {"steps": self.steps, **{name: getattr(self, name).clone() for name in self.STATE}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same rows and columns."""
        self.steps = int(state["steps"])
        for name in self.STATE:
            setattr(self, name, state[name].to(self.ring.device, copy=True))


def _median(values: Tensor) -> Tensor:
    """Return the lower median over the last axis of what is not NaN; `nanmedian` is not deterministic on CUDA."""
    ordered = values.sort(-1).values  # NaN comes last
    middle = ((~ordered.isnan()).sum(-1, keepdim=True) - 1).clamp(min=0) // 2
    return ordered.gather(-1, middle)[..., 0]
