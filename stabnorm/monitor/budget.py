"""`Budget`: how often the costlier data are gathered, so that watching takes no more than its share of a step.

Statistics that may raise an alert are measured at every step, and so is all that they need. The others are dear if they
need one of `DEAR`, or compare with what only `DetailedPast` remembers. They are measured at every k-th step.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stabnorm.monitor.cost import Stopwatch
from stabnorm.monitor.details import DETAIL_NEEDS
from stabnorm.monitor.outputs import say
from stabnorm.statistic import Statistic

DEAR = DETAIL_NEEDS | {"normalized"}
RAREST = 100  # steps from one measurement to the next, at most
_SAMPLES = 64  # steps of each sort whose cost is kept
_FIRST = (8, 16, 32)  # steps after which k is found, before it is every 50 steps
_AGAIN = 50
_STEADY = 0.2  # a new k that differs by less than this share changes nothing


def dear_statistics(chosen: Sequence[Statistic]) -> frozenset[str]:
    """Return the names of the statistics that need not be measured at every step.

    >>> from stabnorm.monitor.statistics import resolve
    >>> sorted(dear_statistics(resolve("standard")))
    ['affine_residual']
    """
    alarming = [statistic for statistic in chosen if statistic.alarm is not None or statistic.floor is not None]
    kept = frozenset[str]().union(*(statistic.needs_all for statistic in alarming))
    spared = [s for s in chosen if s not in alarming and (s.remembers or (s.needs_all - kept) & DEAR)]
    return frozenset(statistic.name for statistic in spared)


class Budget:
    """Finds k from what steps have cost so far, with and without the dear data.

    Args:
        share: the share of a step that watching may take; None measures all at every step.
        agree: returns the k of the first of the ranks that merge, given that of this one.

    Attributes:
        every: k.

    >>> class Clock:  # of steps of 1 s
    ...     bare, flush = 1.0, 0.0
    >>> budget, spent = Budget(0.021, lambda every: every), 0.0
    >>> for step in range(32):  # 30 ms with the dear data, 15 ms without
    ...     spent += 0.030 if budget.is_due(step) else 0.015
    ...     budget.note(spent)
    ...     budget.decide(step + 1, Clock)
    >>> budget.every
    3
    """

    def __init__(self, share: float | None, agree: Callable[[int], int]) -> None:
        self.share, self.every = share, 1
        self._agree = agree
        self._cost = {due: deque[float](maxlen=_SAMPLES) for due in (True, False)}
        self._due = True
        self._spent = 0.0  # until the end of the last step
        self._told = False

    def is_due(self, step: int) -> bool:
        """Whether the dear data are gathered in a step, counted from 0."""
        self._due = step % self.every == 0
        return self._due

    def note(self, spent: float) -> None:
        """Note the seconds spent in hooks and at the end of steps so far; the step is the one that `is_due` said."""
        self._cost[self._due].append(spent - self._spent)
        self._spent = spent

    def decide(self, steps_done: int, clock: Stopwatch) -> None:
        """Find k again, after some of the steps; all ranks that merge call this after each."""
        if self.share is None or (steps_done not in _FIRST and steps_done % _AGAIN):
            return
        wanted = self._wanted(self.share * clock.bare - clock.flush)
        if abs(wanted - self.every) > _STEADY * self.every:
            self.every = wanted
        self.every = self._agree(self.every)

    def _wanted(self, room: float) -> int:
        """Return the least k whose cost fits into so many seconds per step."""
        with_dear, without = (float(np.median(c)) if c else math.nan for c in self._cost.values())
        if math.isnan(with_dear) or with_dear <= room:
            return 1
        if math.isnan(without):
            return 2  # to learn what a step costs without
        if without < room:
            return min(RAREST, math.ceil((with_dear - without) / (room - without)))
        if not self._told:
            self._told = True
            say(
                "stabnorm: watching cannot be kept within budget=%g: what is measured at every step takes longer. "
                "Watch fewer layers or statistics, or raise the budget",
                self.share,
            )
        return RAREST if without < 0.9 * with_dear else 1  # rarer measurements that save nothing would be a loss

    def state_dict(self) -> dict[str, Any]:
        """Return k, so that a resumed run measures at the same steps."""
        return {"every": self.every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a saved k; without a budget, everything is measured."""
        if self.share is not None:
            self.every = max(1, int(state.get("every", 1)))
