"""What a companion is: something to watch beside the norms, whose rows are heads or matrices and not norm layers.

A companion is its settings and its measures, nothing more: it can be copied, pickled and used for several models.
`watch(model)` finds what it looks at and returns a `Watch`, which holds the hooks and what they gathered. What is
gathered is a NamedTuple of sums, one number per row, with a rule to merge two of them: micro-batches, devices and ranks
are merged by the same rule, and a measure is a function of the merged sums.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stabnorm._models.names import NameFilter, Patterns


@dataclass(frozen=True)
class Measure:
    """One number per row and step.

    Attributes:
        name: as in `history()`, in the record and in alerts.
        formula: what it is.
        unit: "1": dimensionless; "nat"; "rad"; or that of a weight, a logit, ...
        source: where it comes from.
        bad: when the literature calls it bad; for the documentation.
        compute: ``sums -> [rows]``.
        threshold: beyond this it is bad; for the closing table.
        alarm: beyond this an alert is raised at once.
        least: below this it is bad; for the closing table.
        advice: what it means when it is over its bound, and where to look.
    """

    name: str
    formula: str
    unit: str
    source: str
    bad: str
    compute: Callable[[Any], Tensor]
    threshold: float | None = None
    alarm: float | None = None
    least: float | None = None
    advice: str = ""
    # What the detector asks beside: no measure is compared with its own past, and none is a norm's gradient.
    floor: ClassVar[None] = None
    axis: ClassVar[str] = "row"


class Watch(ABC):
    """A companion at work on one model.

    Attributes:
        rows: what the rows are, by name, in the order of the model.
        seconds: spent in hooks so far, on the host; not counted in a compiled graph.
    """

    rows: tuple[str, ...]
    seconds: float = 0.0

    @abstractmethod
    def attach(self) -> None:
        """Put the hooks on."""

    @abstractmethod
    def detach(self) -> None:
        """Take every hook off."""

    @abstractmethod
    def discard(self) -> None:
        """Forget what was gathered since the last step."""

    @abstractmethod
    def take(self) -> Any:
        """What was gathered since the last step in this process: a NamedTuple of ``[rows]`` with a method `merge`."""

    @abstractmethod
    def complaint(self, values: Tensor) -> str | None:
        """What to say of a flush's ``[steps, rows, measures]`` where something could not be measured at all."""

    def without(self, values: Tensor, measure: int) -> list[str]:
        """The rows for which a measure has no value in any step."""
        mute = values[..., measure].isnan().all(0)
        return [name for name, is_mute in zip(self.rows, mute.tolist(), strict=True) if is_mute]

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs of the last ones, as tensors and plain containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  # most have no past
        """Go on where `state_dict` was taken, for the same rows."""


class Companion(ABC):
    """Something to watch beside the norms."""

    name: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    cost: ClassVar[str]

    @abstractmethod
    def watch(self, model: nn.Module) -> Watch:
        """Find what there is to watch.

        Raises:
            ValueError: there is nothing, or what there is cannot be understood.
        """


def sampled(length: int, at_most: int | None) -> slice:
    """Evenly spaced positions, the last one among them: no random state is touched, and batch splits change nothing.

    >>> list(range(10)[sampled(10, 3)])
    [1, 5, 9]
    >>> list(range(3)[sampled(3, None)])
    [0, 1, 2]
    """
    stride = 1 if at_most is None else max(1, -(-length // at_most))
    return slice((length - 1) % stride if length else 0, None, stride)


def selected(names: Sequence[str], include: Patterns, exclude: Patterns) -> list[bool]:
    """Which names match one pattern of `include` and none of `exclude`.

    Raises:
        ValueError: a pattern is no regular expression.
    """
    return list(map(NameFilter(include, exclude), names))


def wide(device: torch.device) -> torch.dtype:
    """What sums are kept in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
