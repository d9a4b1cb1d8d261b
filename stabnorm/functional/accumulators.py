"""Accumulators: statistics of parts of the data, which merge exactly by one declared rule for each quantity.

An accumulator is a named tuple of tensors. Its `Layout` declares for every field which quantities are in its rows, by
name and in order, and by which rule each one merges. So micro-batches, blocks of rows, splits of a kernel and ranks all
merge in the same way.
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
        rule: how they merge, see `RULES`.
        names: the names of the quantities; empty if the field is a single quantity and has no rows.
        empty: their value before anything was added.
    """

    rule: Rule
    names: tuple[str, ...] = ()
    empty: float = 0.0


@dataclass(frozen=True)
class Field:
    """A tensor of an accumulator: ``[rows, C]``, ``[rows]``, ``[C]`` or a scalar.

    Args:
        rows: its quantities.
        per_channel: whether each quantity has one number for every channel.
        dtype: dtype of the tensor; int64 for counts.
        weighted_by: returns the weight of an accumulator's means. Default: the field has no mean.
    """

    rows: tuple[Rows, ...]
    per_channel: bool = False
    dtype: torch.dtype = torch.float32
    weighted_by: Callable[[Any], Tensor] | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all rows, in order."""
        return tuple(name for rows in self.rows for name in rows.names)

    @property
    def is_zero_when_empty(self) -> bool:
        """Whether all of it is 0 before anything was added."""
        return all(rows.empty == 0 for rows in self.rows)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Split a tensor of this field into the rows of each rule, as views."""
        if not self.names:
            return [tensor]
        return list(tensor.split([len(rows.names) for rows in self.rows], -2 if self.per_channel else -1))


class Share(NamedTuple):
    """The share of the new part in the merged whole: ``[]`` for one layer, ``[L]`` for several, then axes of 1."""

    weight: Tensor
    first: Tensor  # the old accumulator is empty
    nothing: Tensor  # the new one is empty

    def over(self, axes: int) -> "Share":
        """Return the share with additional axes of size 1 at the end."""
        return Share(*(part[(..., *[None] * axes)] for part in self))


class Layout(Generic[_A]):
    """The layout of an accumulator: what it holds, and how two of them merge.

    Args:
        kind: the class of the named tuple.
        fields: the field of every tensor in it, in order.
    """

    def __init__(self, kind: Callable[..., _A], **fields: Field) -> None:
        self.fields = fields
        self._kind = kind

    def empty(self, layers: int, channels: int, device: torch.device | None = None) -> _A:
        """Create empty accumulators for layers, with an axis ``[L]`` before every shape."""
        with torch.inference_mode(False):  # an inference tensor could not be changed outside of inference mode
            tensors = []
            for field in self.fields.values():
                shape = [layers, *([len(field.names)] if field.names else []), *([channels] * field.per_channel)]
                tensors.append(torch.empty(shape, dtype=field.dtype, device=device))
            accumulators = self._kind(*tensors)
            self.clear_(accumulators)
        return accumulators

    def one(self, channels: int, device: torch.device | None = None) -> _A:
        """Create the empty accumulator of one layer."""
        return self._kind(*(part[0] for part in self.empty(1, channels, device)))

    def clear_(self, accumulators: _A) -> None:
        """Empty the accumulators, in place."""
        for tensor, field in zip(accumulators, self.fields.values(), strict=True):
            for part, rows in zip(field.split(tensor), field.rows, strict=True):
                part.fill_(rows.empty)

    def merge_(self, into: _A, new: _A) -> None:
        """Merge ``new`` into ``into``, in place, for one layer or for all layers with a leading axis.

        The result is the same as if all data had been added at once. If one side is empty, the other one stays.
        """
        shares: dict[Any, Share] = {}
        for tensor, field in zip(into, self.fields.values(), strict=True):  # the weights before the merge
            by = field.weighted_by
            if by is not None and by not in shares:
                shares[by] = _share(by(into), by(new), tensor.dtype)
        for tensor, other, field in zip(into, new, self.fields.values(), strict=True):
            share = None if field.weighted_by is None else shares[field.weighted_by].over(1 + field.per_channel)
            for old_rows, new_rows, rows in zip(field.split(tensor), field.split(other), field.rows, strict=True):
                RULES[rows.rule](old_rows, new_rows, share)

    def merged(self, parts: _A) -> _A:
        """Merge the accumulators of splits, ``[L, S]``, to one for each layer, ``[L]``."""
        layers, splits = parts[0].shape
        channels = next(t.shape[-1] for t, f in zip(parts, self.fields.values(), strict=True) if f.per_channel)
        empty = self.empty(layers, channels, parts[0].device)
        whole = self._kind(*(t.to(part.dtype) for t, part in zip(empty, parts, strict=True)))
        for split in range(splits):
            self.merge_(whole, self._kind(*(part[:, split] for part in parts)))
        return whole


def _share(seen: Tensor, new_seen: Tensor, dtype: torch.dtype) -> Share:
    size = (seen + new_seen).clamp(min=1).to(dtype)  # a quotient of integers would be float32
    return Share(new_seen.to(dtype) / size, seen == 0, new_seen == 0)


# --- the rules ---


def _sum(into: Tensor, new: Tensor, share: Any) -> None:
    into.add_(new)


def _min(into: Tensor, new: Tensor, share: Any) -> None:
    torch.minimum(into, new, out=into)


def _max(into: Tensor, new: Tensor, share: Any) -> None:
    torch.maximum(into, new, out=into)


def _seen_min(into: Tensor, new: Tensor, share: Share) -> None:
    _of_seen(into, new, torch.minimum(into, new), share)


def _seen_max(into: Tensor, new: Tensor, share: Share) -> None:
    _of_seen(into, new, torch.maximum(into, new), share)


def _of_seen(into: Tensor, new: Tensor, both: Tensor, share: Share) -> None:
    into.copy_(torch.where(share.nothing, into, torch.where(share.first, new, both)))


def _mean(into: Tensor, new: Tensor, share: Share) -> None:
    into.lerp_(new, share.weight)


def _mean_or_inf(into: Tensor, new: Tensor, share: Share) -> None:
    into.add_((new - into) * share.weight)


def _moments(into: Tensor, new: Tensor, share: Share) -> None:
    shift, rest, var = into.unbind(-2)
    first, weight = share.first[..., 0], share.weight[..., 0]
    shift.copy_(torch.where(first, new[..., 0, :], shift))
    delta = new[..., 0, :] - shift + (new[..., 1, :] - rest)
    var.add_((new[..., 2, :] - var) * weight).add_(weight * (1 - weight) * delta.square())
    rest.add_(delta * weight)


def _joint_moments(into: Tensor, new: Tensor, share: Share) -> None:
    shift, rest, spread = into[..., :2, :], into[..., 2:4, :], into[..., 4:, :]
    shift.copy_(torch.where(share.first, new[..., :2, :], shift))
    rests = new[..., 2:4, :] - rest
    delta = new[..., :2, :] - shift + rests
    apart = share.weight * (1 - share.weight) * delta
    spread.lerp_(new[..., 4:, :], share.weight)
    spread[..., :2, :].addcmul_(apart, delta[..., :1, :])
    spread[..., 2, :].addcmul_(apart[..., 1, :], delta[..., 1, :])
    rest.addcmul_(delta, share.weight)


# The rules by which rows ``[..., rows, C]`` or ``[..., rows]`` of two accumulators merge, in place. A mean of 1e4 in
# one float32 has an error of 1e-3, and so would every difference of means. Therefore a mean is kept as a shift, which
# the first data set, and a rest. Means and variances merge by Chan's rule (Chan, Golub, LeVeque 1983): with w the share
# of the new data, mean = mean_a + w delta, var = (1 - w) var_a + w var_b + w (1 - w) delta^2.
RULES: dict[Rule, Callable[[Tensor, Tensor, Any], None]] = {
    "sum": _sum,
    "min": _min,
    "max": _max,
    "seen_min": _seen_min,  # the value of an empty accumulator does not matter
    "seen_max": _seen_max,
    "mean": _mean,
    "mean_or_inf": _mean_or_inf,  # is infinite, instead of NaN, if a part is infinite
    "moments": _moments,  # moments of one variable: shift, rest, variance
    "joint_moments": _joint_moments,  # moments of two: shifts, rests, then variance, covariance, variance
}
