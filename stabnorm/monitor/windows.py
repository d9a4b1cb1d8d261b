"""The past of many series at once: a window of logarithms, its median and robust scale, and scores.

All this is done on the host, when the monitor flushes. Between two looks at median and scale nothing that a score
depends on changes, so these steps are computed at once.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stabnorm.monitor.baseline import ARMED, BOUND, CLIP, LEARNT, PAST, REFRESH, lower_median

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


class Span(NamedTuple):
    """How a window looks at the past.

    Attributes:
        every: steps between two values that it takes.
        size: values in the window.
        refresh: values between two looks at median and scale.
        learnt: values before the first look.
        armed: values before a score may raise an alert.
        again: the same after a change that was announced, or after a gap that left hardly a value in the window.
    """

    every: int
    size: int
    refresh: int
    learnt: int
    armed: int
    again: int

    def until_look(self, value: int) -> int:
        """Return how many values from this one on have the same median and scale. It never wraps around the window."""
        return self.learnt - value if value < self.learnt else self.refresh - (value - self.learnt) % self.refresh

    def looks_at(self, value: int) -> bool:
        """Whether median and scale are computed again before this value."""
        return value >= self.learnt and self.until_look(value) == self.refresh


FAST = Span(1, PAST, REFRESH, LEARNT, ARMED, 64)
SLOW = Span(16, 64, 4, 16, 32, 16)  # sees a slow drift, which the fast window follows: armed after 512 steps


class Window:
    """Compares series with their own past.

    Args:
        span: which past.
        floors: ``[S]``, the least scale of each series, in log units.
        upward: ``[S]`` bool: only a rise counts in this series.
        exempt: ``[S]`` bool: this series scores nothing. Default: none is exempt.
        harmless: ``[S]``, logarithms: of a rise only what lies beyond counts. Default: all of it.

    Shape: everything has the shape ``[S]``; the ring of values is ``[S, span.size]``.

    >>> window = Window(FAST, np.float32([0.1]), np.array([False]))
    >>> scores, centers, scales = window.follow(np.where(np.arange(302) < 300, 0, 1).astype(np.float32)[:, None])
    >>> scores[298:, 0].round(3).tolist()
    [0.0, 0.0, 5.0, 10.0]
    """

    def __init__(
        self, span: Span, floors: Floats, upward: Flags, exempt: Flags | None = None, harmless: Floats | None = None
    ) -> None:
        self.span, self.steps = span, 0
        self._floors, self._upward = floors, upward
        self._exempt = np.zeros_like(upward) if exempt is None else exempt
        self._harmless = None if harmless is None or np.isneginf(harmless).all() else harmless
        self.ring = np.full((len(floors), span.size), np.nan, np.float32)
        self.center, self.before = np.zeros((2, len(floors)), np.float32)
        self.scale = np.ones_like(self.center)
        self.seen = np.zeros(len(floors), np.int64)  # values of each series, because a layer may start late
        self.held = np.full_like(self.center, np.nan)  # the last score, for the steps that are not taken

    def follow(self, logs: Floats) -> Floats:
        """Take in the next steps, and return by how many robust standard deviations each is off.

        The score must hold for two values, or be twice as high. It is NaN until the window is armed and the score was
        below half of the bound once, because what moved before that has not left a past. It keeps its value at steps
        that the window does not take.

        Args:
            logs: ``[steps, S]``, logarithms; what is not finite is no value.

        Returns:
            ``[3, steps, S]``: scores, and the medians and scales that they were made with.
        """
        first = -(-self.steps // self.span.every)  # the number of the first value that it takes now
        taken = logs[-self.steps % self.span.every :: self.span.every]
        marks = np.empty((3, 1 + len(taken), len(self.center)), np.float32)
        marks[:, 0] = self.held, self.center, self.scale
        done = 0
        while done < len(taken):
            if self.span.looks_at(first + done):
                self._look()
            end = min(len(taken), done + self.span.until_look(first + done))
            marks[0, 1 + done : 1 + end] = self._scores(taken[done:end], (first + done) % self.span.size)
            marks[1, 1 + done : 1 + end], marks[2, 1 + done : 1 + end] = self.center, self.scale
            done = end
        known_by = (self.steps + np.arange(len(logs))) // self.span.every - first + 1
        self.steps += len(logs)
        return marks[:, known_by]

    def _scores(self, logs: Floats, place: int) -> Floats:
        """Take in values of one median and scale, and return their scores."""
        known = np.isfinite(logs)
        seen = self.seen + (np.cumsum(known, axis=0) - known)  # before each value
        with np.errstate(invalid="ignore", over="ignore"):
            off = (logs - self.center) / self.scale
            kept = self.center + np.clip(off, -CLIP, CLIP) * self.scale  # outliers stay out
            if self._harmless is not None:
                beyond = (logs - np.maximum(self.center, self._harmless)) / self.scale
                np.copyto(off, np.maximum(beyond, 0), where=off > 0)
        learning = ~known | np.isnan(off) | (seen < self.span.learnt)
        np.copyto(kept, logs, where=learning)
        kept[~known] = np.nan
        self.ring[:, place : place + len(logs)] = kept.T
        np.copyto(off, 0, where=learning | self._exempt | (self._upward & (off < 0)))
        off = np.abs(off)
        before = np.concatenate([self.before[None], off[:-1]])
        scores: Floats = np.maximum(np.minimum(off, before), off / 2)
        scores[seen < self.span.armed] = np.nan
        if np.isnan(self.held).any():
            scores[~np.logical_or.accumulate(np.isfinite(self.held) | (scores < BOUND / 2), axis=0)] = np.nan
        self.held = scores[-1].copy()
        self.before = off[-1].copy()
        self.seen = seen[-1] + known[-1]
        return scores

    def _look(self) -> None:
        self.center = lower_median(self.ring)
        spread = np.float32(1.4826) * lower_median(np.abs(self.ring - self.center[:, None]))
        self.scale = np.maximum(spread, self._floors)
        few = np.isfinite(self.ring).sum(1) < self.span.refresh  # after a gap as long as the window
        self.seen[few] = np.minimum(self.seen, self._forgotten)[few]

    @property
    def _forgotten(self) -> int:
        """The number of values after which `again` more are missing until the window is armed."""
        return self.span.armed - self.span.again

    def forget(self) -> None:
        """Learn again what is usual, because something was changed on purpose."""
        self.ring = np.full_like(self.ring, np.nan)
        self.center = np.full_like(self.center, np.nan)  # until the next look, nothing is clipped
        self.seen = np.minimum(self.seen, self._forgotten)
        self.held = np.full_like(self.held, np.nan)

    def state_dict(self, rows: int) -> dict[str, Any]:
        """Return the state as tensors and plain containers; the series are those of so many rows."""
        arrays = {name: getattr(self, name).astype(np.float32) for name in _STATE}
        shaped = {name: array.reshape(rows, -1, *array.shape[1:]) for name, array in arrays.items()}
        return {"steps": self.steps, **{name: torch.from_numpy(array) for name, array in shaped.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same series."""
        self.steps = int(state["steps"])
        for name in _STATE:
            own = getattr(self, name)
            setattr(self, name, state[name].cpu().numpy().reshape(own.shape).astype(own.dtype))


_STATE = ("ring", "center", "scale", "before", "seen", "held")
