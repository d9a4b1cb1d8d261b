"""What monitoring costs, as it is told."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What monitoring costs, in milliseconds per step on the host, and as a share of the step without it.

    In a compiled model the hooks' share is inside the graph, and on a GPU their kernels run behind the host's back:
    both are not in here; an A/B run measures them.
    """

    hooks: float
    step: float
    flush: float
    percent: float

    def __str__(self) -> str:
        total = self.hooks + self.step + self.flush
        if math.isnan(total):
            return "unknown: too few steps to say"
        return (
            f"{total:.2f} ms per step ({self.percent:.1f} %): hooks {self.hooks:.2f}, step {self.step:.2f}, "
            f"flush {self.flush:.2f}"
        )
