"""What one forward shows of a model's norms: where each channel goes, and what each norm and linear layer reads.

Nothing is decided here. `_follow` writes these records down, `_plan` decides from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from stabnorm.fold._readers import Linear, View
from stabnorm.fold._sites import Site


@dataclass(frozen=True, eq=False)
class Obstacle:
    """An operation that no scale passes, or, with `shift_only`, no shift."""

    tags: Tensor
    text: str
    shift_only: bool = False


@dataclass(frozen=True, eq=False)
class Residual:
    """Features of linear layers that were added to a stream of norm channels: ``features[i]`` to ``stream[i]``."""

    stream: Tensor
    features: Tensor
    path: str


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a norm: what its channels read.

    Args:
        site: Index of the norm.
        source: "stream": norm channels, one per channel; "linear": features of linear layers; "raw": anything else.
        tags: What is read.
        channels: The channel each of `tags` lands on.
        factor: What a shift of each was multiplied by on the way; NaN where that differs by position.
    """

    site: int
    source: str
    tags: Tensor
    channels: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Use:
    """A part of a parameter that an operation reads; `linear` is the `Linear` it is weight or bias of, if any."""

    view: View
    linear: int | None
    text: str


@dataclass
class Trace:
    """The records. Tags count from 1: first the norms' channels, site by site, then the features of each `Linear`.

    `unreached` are obstacles, too: what did not run, and could read these tags. `functional` names the function that a
    module's own forward normalises with. `reordered` are norms whose output lies in another order in memory than their
    input, with the axes of `memory_axes`.
    `buffers` are the names of those that an operation reads.
    """

    sites: Sequence[Site]
    first_tags: list[int] = field(default_factory=list)
    linears: list[Linear] = field(default_factory=list)
    obstacles: list[Obstacle] = field(default_factory=list)
    unreached: list[Obstacle] = field(default_factory=list)
    residuals: list[Residual] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    functional: dict[str, str] = field(default_factory=dict)
    reordered: dict[str, tuple[int, int]] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    next_tag: int = 1

    def new_tags(self, count: int) -> int:
        """Reserve `count` tags; returns the first."""
        self.next_tag += count
        return self.next_tag - count
