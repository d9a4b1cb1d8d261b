"""Accumulators: what was seen in parts becomes what was seen at once, by one declared rule for each quantity.

An accumulator is a named tuple of tensors. Its `Layout` says of every field which quantities lie in its rows, by name
and in order, and how each merges. So micro-batches, blocks of rows, splits of a kernel and ranks all merge alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Rule = Literal["sum", "min", "max", "seen_min", "seen_max", "mean", "mean_or_inf", "moments", "joint_moments"]
_A = TypeVar("_A", bound=tuple[Tensor, ...])


class Rows(NamedTuple):
    """Consecutive rows of a field that merge by the same rule.

    Attributes:
        rule: see `RULES`.
        names: of the quantities; none where the field is a single one and has no rows.
        empty: their value where nothing was seen.
    """

    rule: Rule
    names: tuple[str, ...] = ()
    empty: float = 0.0


@dataclass(frozen=True)
class Field:
    """A tensor of an accumulator: ``[rows, C]``, ``[rows]``, ``[C]`` or a scalar.

    Args:
        rows: its quantities.
        per_channel: whether each is one number for every channel.
        dtype: int64 for what is counted.
        weighted_by: of an accumulator, how much its means weigh. Default: there is no mean in this field.
    """

    rows: tuple[Rows, ...]
    per_channel: bool = False
    dtype: torch.dtype = torch.float32
    weighted_by: Callable[[Any], Tensor] | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all rows, in order."""
        return tuple(name for rows in self.rows for name in rows.names)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each rule, as views."""
        if not self.names:
            return [tensor]
        return list(tensor.split([len(rows.names) for rows in self.rows], -2 if self.per_channel else -1))


class Share(NamedTuple):
    """How much of the whole is new: ``[]`` for one layer, ``[L]`` for several, and axes of 1 after it."""

    weight: Tensor
    first: Tensor  # nothing was seen before
    nothing: Tensor  # nothing is new

    def over(self, axes: int) -> "Share":
        """With so many axes more."""
        return Share(*(part[(..., *[None] * axes)] for part in self))


class Layout(Generic[_A]):
    """What an accumulator holds, and how two of them merge.

    Args:
        kind: the named tuple.
        fields: of every tensor in it, in order.
    """

    def __init__(self, kind: Callable[..., _A], **fields: Field) -> None:
        self.fields = fields
        self._kind = kind

    def empty(self, layers: int, channels: int, device: torch.device | None = None) -> _A:
        """The accumulators of layers that saw nothing yet: an axis ``[L]`` before every shape."""
        with torch.inference_mode(False):  # or it could not be added to outside of it
            tensors = []
            for field in self.fields.values():
                shape = [layers, *([len(field.names)] if field.names else []), *([channels] * field.per_channel)]
                tensors.append(torch.empty(shape, dtype=field.dtype, device=device))
            accumulators = self._kind(*tensors)
            self.clear_(accumulators)
        return accumulators

    def one(self, channels: int, device: torch.device | None = None) -> _A:
        """The accumulator of one layer that saw nothing yet."""
        return self._kind(*(part[0] for part in self.empty(1, channels, device)))

    def clear_(self, accumulators: _A) -> None:
        """Set them back to nothing seen, in place."""
        for tensor, field in zip(accumulators, self.fields.values(), strict=True):
            for part, rows in zip(field.split(tensor), field.rows, strict=True):
                part.fill_(rows.empty)

    def merge_(self, into: _A, new: _A) -> None:
        """Add ``new`` to ``into``, in place, as if both had been seen at once; one layer, or all with a leading axis.

        An empty side leaves the other as it is.
        """
        shares: dict[Any, Share] = {}
        for tensor, field in zip(into, self.fields.values(), strict=True):  # before anything changes
            by = field.weighted_by
            if by is not None and by not in shares:
                shares[by] = _share(by(into), by(new), tensor.dtype)
        for tensor, other, field in zip(into, new, self.fields.values(), strict=True):
            share = None if field.weighted_by is None else shares[field.weighted_by].over(1 + field.per_channel)
            for mine, theirs, rows in zip(field.split(tensor), field.split(other), field.rows, strict=True):
                RULES[rows.rule](mine, theirs, share)

    def merged(self, parts: _A) -> _A:
        """One accumulator for each layer, ``[L]``, from those of its splits, ``[L, S]``."""
        layers, splits = parts[0].shape
        channels = next(t.shape[-1] for t, f in zip(parts, self.fields.values(), strict=True) if f.per_channel)
        empty = self.empty(layers, channels, parts[0].device)
        whole = self._kind(*(mine.to(theirs.dtype) for mine, theirs in zip(empty, parts, strict=True)))
        for split in range(splits):
            self.merge_(whole, self._kind(*(part[:, split] for part in parts)))
        return whole


def _share(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> Share:
    size = (mine + theirs).clamp(min=1).to(dtype)  # a quotient of integers would be float32
    return Share(theirs.to(dtype) / size, mine == 0, theirs == 0)


# --- the rules ---


def _sum(mine: Tensor, theirs: Tensor, share: Any) -> None:
    mine.add_(theirs)


def _min(mine: Tensor, theirs: Tensor, share: Any) -> None:
    torch.minimum(mine, theirs, out=mine)


def _max(mine: Tensor, theirs: Tensor, share: Any) -> None:
    torch.maximum(mine, theirs, out=mine)


def _seen_min(mine: Tensor, theirs: Tensor, share: Share) -> None:
    _of_seen(mine, theirs, torch.minimum(mine, theirs), share)


def _seen_max(mine: Tensor, theirs: Tensor, share: Share) -> None:
    _of_seen(mine, theirs, torch.maximum(mine, theirs), share)


def _of_seen(mine: Tensor, theirs: Tensor, both: Tensor, share: Share) -> None:
    mine.copy_(torch.where(share.nothing, mine, torch.where(share.first, theirs, both)))


def _mean(mine: Tensor, theirs: Tensor, share: Share) -> None:
    mine.lerp_(theirs, share.weight)


def _mean_or_inf(mine: Tensor, theirs: Tensor, share: Share) -> None:
    mine.add_((theirs - mine) * share.weight)


def _moments(mine: Tensor, theirs: Tensor, share: Share) -> None:
    shift, rest, var = mine.unbind(-2)
    first, weight = share.first[..., 0], share.weight[..., 0]
    shift.copy_(torch.where(first, theirs[..., 0, :], shift))
    delta = theirs[..., 0, :] - shift + (theirs[..., 1, :] - rest)
    var.add_((theirs[..., 2, :] - var) * weight).add_(weight * (1 - weight) * delta.square())
    rest.add_(delta * weight)


def _joint_moments(mine: Tensor, theirs: Tensor, share: Share) -> None:
    shift, rest, spread = mine[..., :2, :], mine[..., 2:4, :], mine[..., 4:, :]
    shift.copy_(torch.where(share.first, theirs[..., :2, :], shift))
    rests = theirs[..., 2:4, :] - rest
    delta = theirs[..., :2, :] - shift + rests
    apart = share.weight * (1 - share.weight) * delta
    spread.lerp_(theirs[..., 4:, :], share.weight)
    spread[..., :2, :].addcmul_(apart, delta[..., :1, :])
    spread[..., 2, :].addcmul_(apart[..., 1, :], delta[..., 1, :])
    rest.addcmul_(delta, share.weight)


# How rows ``[..., rows, C]`` or ``[..., rows]`` of two accumulators merge, in place. A mean of 1e4 in one float32 is
# off by 1e-3, which would be the error of every difference of means: so it is a shift, which the first to come sets,
# and a rest. Means and variances merge by Chan's rule (Chan, Golub, LeVeque 1983): with w the share of the new,
# mean = mean_a + w delta, var = (1 - w) var_a + w var_b + w (1 - w) delta^2.
RULES: dict[Rule, Callable[[Tensor, Tensor, Any], None]] = {
    "sum": _sum,
    "min": _min,
    "max": _max,
    "seen_min": _seen_min,  # the empty value may be any
    "seen_max": _seen_max,
    "mean": _mean,
    "mean_or_inf": _mean_or_inf,  # stays infinite where a part is, instead of NaN
    "moments": _moments,  # of one variable: shift, rest, variance
    "joint_moments": _joint_moments,  # of two: shifts, rests; variance, covariance, variance
}
