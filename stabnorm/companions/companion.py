"""The base of companions, which measure more than the moments of norms, in rows such as heads or matrices.

A companion is its settings and its statistics, nothing more: it can be copied, pickled and used for several models.
`watch(model)` finds what it looks at and returns a `Watch`, which holds the hooks and what they gathered. What is
gathered is a NamedTuple of sums, one number per row, with a rule to merge two of them: micro-batches, devices and ranks
are merged by the same rule, and a statistic is a function of the merged sums.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stabnorm._models.devices import device_of
from stabnorm._models.hooks import take_off
from stabnorm._models.names import NameFilter, Patterns
from stabnorm._models.watched import Watching
from stabnorm.statistic import Statistic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Sums = TypeVar("Sums", bound=tuple[Tensor, ...])


class Watch(ABC):
    """A companion that watches one model.

    Attributes:
        rows: names of the rows, in the order of the model. A step may add some, see `take`.
        seconds: spent in hooks so far, on the host; not counted in a compiled graph.
        paused: whether forwards do not count now, for example those of a validation.
    """

    rows: tuple[str, ...]
    seconds: float = 0.0
    paused: bool = False

    @abstractmethod
    def attach(self) -> None:
        """Register the hooks."""

    @abstractmethod
    def detach(self) -> None:
        """Remove all hooks."""

    @abstractmethod
    def discard(self) -> None:
        """Discard what was gathered since the last step."""

    @abstractmethod
    def take(self) -> Any:
        """Return what this process gathered since the last step: a NamedTuple of ``[rows]`` with a method `merge`.

        What was only seen now may have got its rows now; `rows` then has them, too.
        """

    @abstractmethod
    def complaint(self, values: Tensor) -> str | None:
        """Return a warning about a flush, ``[steps, rows, statistics]``, in which something could not be measured."""

    def see_norms(self, layers: Sequence[str], now: "NormMoments") -> None:  # noqa: B027  # most companions ask no norm
        """Read the monitor's moments of norms in this step, merged over ranks; called right before `take`.

        Args:
            layers: their names.
            now: their moments, of which `Companion.needs` are gathered.
        """

    def see_loss(self, loss: "StepLoss") -> None:  # noqa: B027  # most companions compute no loss
        """Take the loss of this step, which can be computed again; called right before `take`."""

    def counts(self, model: nn.Module, module: nn.Module) -> bool:
        """Whether a forward of a module in the model counts now. A module in eval mode does not train."""
        return model.training and module.training and not self.paused

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next step needs, as tensors and plain containers."""
        return {}

    def expect(self, rows: Sequence[str]) -> None:  # noqa: B027  # most know all their rows from the start
        """Take what rows are not known yet from those of a saved run."""

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  # most have no past
        """Continue from a state for the same rows."""


class StepLoss(NamedTuple):
    """The loss of a step, to be computed again on the same batch.

    Attributes:
        closure: computes it, and changes nothing that is not put back by itself; None if it was not given.
        scale: the factor of the loss scaler; None without a scaler.
        ranks: whether to take the mean over processes: False, True for all of them, or a process group.
    """

    closure: Callable[[], Tensor | None] | None
    scale: Tensor | float | None = None
    ranks: "bool | ProcessGroup" = False


class NormMoments(Protocol):
    """What a companion may read of the monitor's norms, ``[layers]`` each: `stabnorm.monitor.past.Moments` has it."""

    @property
    def ran(self) -> Tensor:
        """Whether the layer saw a valid token."""

    @property
    def affine_residual(self) -> Tensor:
        """The share that no affine map per channel reproduces; the companion must need "normalized"."""


class Companion(ABC):
    """The base class of companions.

    Attributes:
        name: its name, also in a monitor and in a record.
        statistics: what it measures of each row; `compute` of each gets the merged sums, and None.
        cost: the cost, for the documentation.
        needs: the data of norms that the monitor must gather for it, see `Statistic.needs`. Default: nothing.
        computes_loss: whether it computes the loss of a step again, see `Watch.see_loss`. Default: False.
    """

    name: ClassVar[str]
    statistics: ClassVar[tuple[Statistic, ...]]
    cost: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    computes_loss: ClassVar[bool] = False

    @abstractmethod
    def watch(self, model: nn.Module) -> Watch:
        """Find what to watch in a model.

        Raises:
            ValueError: there is nothing, or what there is cannot be understood.
        """


class HookedWatch(Watch, Generic[Sums]):
    """A watch whose hooks add to sums of all rows, which lie on each device that a watched module runs on.

    Args:
        kind: the NamedTuple of sums; it has a method `merge`.
        rows: what the rows are, by name.
    """

    def __init__(self, kind: type[Sums], rows: Sequence[str]) -> None:
        self.rows, self._kind = tuple(rows), kind
        self._sums: dict[torch.device, Sums] = {}
        self._handles: list[Watching] = []
        self._places: list[Place[Sums]] = []
        self._had_values: set[str] = set()  # rows that had some in an earlier flush

    def sums(self, device: torch.device) -> Sums:
        """The sums of all rows on a device; of a model spread over several the other rows stay empty."""
        if device not in self._sums:
            shape = (len(self._kind._fields), len(self.rows))  # type: ignore[attr-defined]
            self._sums[device] = self._kind(*torch.zeros(shape, dtype=wide(device), device=device))
        return self._sums[device]

    def detach(self) -> None:
        """Remove all hooks."""
        take_off(self._handles)
        self._places.clear()

    def discard(self) -> None:
        """Set the sums to zero; drop those on a device that the model has left."""
        inhabited = {place.into[0].device for place in self._places}
        self._sums = {device: sums for device, sums in self._sums.items() if device in inhabited or not inhabited}
        for sums in self._sums.values():
            for part in sums:
                part.zero_()

    def without(self, values: Tensor, statistic: int) -> list[str]:
        """Return the rows for which a statistic has never had a value; one that turned NaN was seen before."""
        empty = values[..., statistic].isnan().all(0).tolist()
        self._had_values |= {name for name, is_empty in zip(self.rows, empty, strict=True) if not is_empty}
        return [name for name in self.rows if name not in self._had_values]

    def take(self) -> Sums:
        """Merge the sums of all devices."""
        return functools.reduce(self._kind.merge, self._sums.values())  # type: ignore[attr-defined]


class Place(Generic[Sums]):
    """The rows of one watched module, and what its hooks add to: `into`.

    Args:
        watch: whose rows they are.
        module: the module.
        rows: its rows among the watch's.
        model: the whole model, whose device counts where the module has no tensors.
    """

    def __init__(self, watch: HookedWatch[Sums], module: nn.Module, rows: slice, model: nn.Module) -> None:
        self._watch, self._rows = watch, rows
        # Now, not at the first forward: nothing may change under a compiled graph.
        self.move(device_of(module, model))

    def move(self, device: torch.device) -> None:
        """Add to the sums on this device from now on."""
        self.into: Sums = self._watch._kind(*(part[self._rows] for part in self._watch.sums(device)))


def merged(first: Sums, second: Sums, largest: str) -> Sums:
    """Merge the sums of two micro-batches, devices or ranks: sums are added, and of one field the larger is kept."""
    pairs = [(a, b.to(a.device)) for a, b in zip(first, second, strict=True)]
    names = first._fields  # type: ignore[attr-defined]
    parts = (torch.maximum(a, b) if name == largest else a + b for name, (a, b) in zip(names, pairs, strict=True))
    return type(first)(*parts)


def sampled(length: int, at_most: int | None) -> slice:
    """Return evenly spaced positions with the last one. This uses no random state and does not depend on batch splits.

    >>> list(range(10)[sampled(10, 3)])
    [1, 5, 9]
    >>> list(range(3)[sampled(3, None)])
    [0, 1, 2]
    """
    stride = 1 if at_most is None else max(1, -(-length // at_most))
    return slice((length - 1) % stride if length else 0, None, stride)


def selected(names: Sequence[str], include: Patterns, exclude: Patterns) -> list[bool]:
    """Return which names match one pattern of `include` and none of `exclude`.

    Raises:
        ValueError: a pattern is no regular expression.
    """
    return list(map(NameFilter(include, exclude), names))


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype of sums: float64 if the device supports it."""
    return torch.float32 if device.type == "mps" else torch.float64
