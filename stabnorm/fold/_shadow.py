"""Tag planes: for each element of a tensor a tag, followed through every operation that only moves elements.

A tag is a number: 0 for an element that is not followed, `ZERO` for an exact zero from a padding, and a positive
integer for one channel of one norm, or one output feature of one linear layer. Tags are float64. So an operation that
moves or averages activations can be run again on their tags, and needs no rule of its own.

Beside its tag an element has the factor by which its shift was multiplied since: after ``s * norm(x)`` a scale that is
folded out of the norm is the same, but its shift is s times as large.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

aten = torch.ops.aten
ZERO = -1.0


@dataclass(frozen=True, eq=False)
class Shadow:
    """The tag plane of one tensor, and the elements' factors; None where every factor is 1."""

    tags: Tensor
    factor: Tensor | None = None

    @cached_property
    def present(self) -> Tensor:
        """The positive tags, each once and in order."""
        tags = self.tags.flatten().clamp(min=0).long()
        seen = torch.zeros(int(tags.max()) + 1 if tags.numel() else 1, dtype=torch.bool, device=tags.device)
        seen[tags] = True
        seen[0] = False
        return seen.nonzero().flatten().cpu()

    def factors(self) -> Tensor:
        """Give the factors, also where they are all 1."""
        return torch.ones_like(self.tags) if self.factor is None else self.factor


Shadows = Callable[[Any], Shadow | None]

_SAME = {aten._to_copy, aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh}
_RESHAPE = {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias}
_MOVES = {
    aten.t, aten.transpose, aten.permute, aten.movedim, aten.slice, aten.select, aten.narrow, aten.expand, aten.squeeze,
    aten.unsqueeze, aten.unbind, aten.split, aten.split_with_sizes, aten.chunk, aten.unsafe_split, aten.unsafe_chunk,
    aten.unsafe_split_with_sizes, aten.cat, aten.stack, aten.roll, aten.flip, aten.repeat, aten.repeat_interleave,
    aten.index, aten.index_select, aten.gather, aten.unfold, aten.diagonal, aten.constant_pad_nd, aten.pixel_shuffle,
    aten.pixel_unshuffle, aten.channel_shuffle, aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d,
    aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d, aten.rot90, aten.im2col, aten._unsafe_index,
    *_SAME, *_RESHAPE,
}  # fmt: skip
_AVERAGES = {
    aten.mean, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d,
    aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.upsample_nearest1d, aten.upsample_nearest2d,
    aten.upsample_nearest3d, aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d, aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d,
    aten.upsample_bicubic2d,
}  # fmt: skip


def moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shadow: Shadows, out: Any) -> list[Shadow] | None:
    """Give the tag planes of the results, if `func` only moves elements of its first argument; None if it does more."""
    if func.overloadpacket not in _MOVES or func is aten.view.dtype or not _all_floating(out):
        return None
    first, *rest = args
    sources = [(t, shadow(t)) for t in (first if isinstance(first, list | tuple) else [first])]
    if all(source is None for _, source in sources):  # only an index has tags
        return None

    def run(plane: Callable[[Shadow], Tensor], fill: float, padding: float) -> list[Tensor]:
        planes = [
            torch.full(t.shape, fill, dtype=torch.float64, device=t.device) if source is None else plane(source)
            for t, source in sources
        ]
        result = _run(func, planes if isinstance(first, list | tuple) else planes[0], rest, kwargs, padding)
        return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]

    is_zero = func.overloadpacket is aten.constant_pad_nd and (len(rest) < 2 or rest[1] == 0)
    is_zero |= func.overloadpacket is aten.im2col
    tags = run(lambda source: source.tags, 0.0, ZERO if is_zero else 0.0)
    if all(source is None or source.factor is None for _, source in sources):
        return [Shadow(t) for t in tags]
    return [Shadow(t, f) for t, f in zip(tags, run(Shadow.factors, 1.0, 1.0), strict=True)]


def _run(func: Any, first: Any, rest: list[Any], kwargs: dict[str, Any], padding: float) -> Any:
    packet = func.overloadpacket
    if packet in _SAME:
        return first
    if packet in _RESHAPE:
        return first.reshape(rest[0])
    if packet is aten.constant_pad_nd:
        return aten.constant_pad_nd(first, rest[0], padding)
    if packet is aten.im2col:  # it pads with zeros
        patches = func(torch.ones_like(first), *rest, **kwargs)
        return torch.where(patches == 0, padding, func(first, *rest, **kwargs))
    return func(first, *rest, **kwargs)


def averaged(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shadow: Shadows, out: Any) -> Shadow | None:
    """Give the tag plane of an average, interpolation or sum over elements with one tag; None if the tags differ."""
    source = shadow(args[0]) if args else None
    if func.overloadpacket not in _AVERAGES | {aten.sum} or source is None or not _all_floating(out):
        return None
    if func.overloadpacket is aten.sum:
        func = aten.mean  # of the tags; the caller reports that a sum adds the shift several times
    kwargs = {name: value for name, value in kwargs.items() if name != "dtype"}

    def average(plane: Tensor) -> Tensor:
        result: Tensor = func(plane, *args[1:], **kwargs)
        return result

    tags = average(source.tags).round()
    tags = torch.where(torch.isin(tags, torch.unique(source.tags)), tags, 0.0)
    # The mean of different tags may be a tag by chance, the mean of their scrambles is not that tag's scramble.
    if not torch.allclose(average(_scrambled(source.tags)), _scrambled(tags), rtol=0, atol=1e-9):
        return None
    if source.factor is None:
        return Shadow(tags)
    factor = average(source.factor)
    same = torch.allclose(average(source.factor.square()), factor.square(), rtol=1e-9, atol=0)
    return Shadow(tags, factor) if same else None


def _scrambled(tags: Tensor) -> Tensor:
    return 1.5 + 0.5 * torch.sin(tags * 12.9898 + 78.233)


def _all_floating(out: Any) -> bool:
    return all(t.is_floating_point() for t in pytree.tree_leaves(out) if isinstance(t, Tensor))


def function_of(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """List each key once, with its value; None if a key has several values, or is not positive."""
    keys, values = keys.flatten().long(), values.flatten().double()
    if not keys.numel() or bool((keys <= 0).any()):
        return None
    table = torch.full((int(keys.max()) + 1,), torch.nan, dtype=torch.float64, device=keys.device)
    table[keys] = values
    if not torch.equal(table[keys], values):
        return None
    present = torch.isfinite(table).nonzero().flatten()
    return present.cpu(), table[present].cpu()


@dataclass(frozen=True, eq=False)
class Columns:
    """What reaches each input of a linear layer.

    Args:
        tags: int64, 0 where nothing followed does.
        factor: float64; NaN where the shift does not reach all positions alike.
        padded: True when padding's zeros reach inputs that are followed elsewhere.
        problem: why no scale can be folded into these inputs; empty if one can.
        on: which input this was seen on, where it is not the user's.
    """

    tags: Tensor
    factor: Tensor
    padded: bool
    problem: str
    on: str = ""

    def same(self, other: "Columns") -> bool:
        """Whether the same arrives, apart from padding."""
        return (
            torch.equal(self.tags, other.tags)
            and torch.allclose(self.factor, other.factor, rtol=1e-12, atol=0, equal_nan=True)
            and self.problem == other.problem
        )


def columns(shadow: Shadow, gather: Callable[[Tensor], Tensor], on: str = "") -> Columns:
    """Say what reaches each input, over all positions; `gather` turns a plane into ``[groups, inputs, positions]``."""
    planes = gather(shadow.tags)
    high, low = planes.amax(-1), torch.where(planes > 0, planes, torch.inf).amin(-1)
    followed = high > 0
    problem = ""
    if bool((followed & (low != high)).any()):
        problem = "one of its inputs reads several channels, so it mixes positions or norms and not channels"
    elif bool((followed[..., None] & (planes == 0)).any()):
        problem = "it reads positions that did not pass the norm with the same weight"
    padded = bool((followed[..., None] & (planes == ZERO)).any())
    factor = torch.ones_like(high)
    if shadow.factor is not None:
        factors = gather(shadow.factor)
        most = torch.where(planes > 0, factors, -torch.inf).amax(-1)
        least = torch.where(planes > 0, factors, torch.inf).amin(-1)
        factor = torch.where(followed, torch.where(most == least, most, torch.nan), 1.0)
    return Columns(torch.where(followed, high, 0.0).long().cpu(), factor.cpu(), padded, problem, on)
