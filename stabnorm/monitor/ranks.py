"""Merge the measurements of several processes: each one sends what it gathered in a step, and all merge them alike.

One collective a step, whatever is gathered: the slabs travel as bytes in one flat buffer. Every rank then merges the
same bytes in the same order, so that all hold the same numbers bit for bit, and the catalogue, the alerts and the
record are those of the whole batch. A rank sends 4 bytes for each moment and each gradient of a channel (212 kB for 25
layers of 192), and holds as many times that as there are ranks until the step is over.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stabnorm._models.ranks import gather_in_group, ranks
from stabnorm.errors import StabNormError
from stabnorm.functional import RawMoments, merge_moments_
from stabnorm.functional.detail import DetailMoments, merge_detail_
from stabnorm.functional.moments import REST_X, SHIFT_X

Slab = TypeVar("Slab", bound=tuple[Tensor, ...])


class Gathered(NamedTuple):
    """What a band of layers has gathered in one step.

    Attributes:
        moments: the moments of their inputs.
        gradient: gradient sums ``[L, 2, C]``, NaN where there is none.
        running: running buffers of the layers, ``[L, 2, C]``; None if no layer has any.
        detail: the detail moments; None if no statistic needs them.
        between: the variance between ranks, ``[L, C]``; None on one process.
    """

    moments: RawMoments
    gradient: Tensor
    running: Tensor | None = None
    detail: DetailMoments | None = None
    between: Tensor | None = None


class _One(NamedTuple):
    """A tensor, as what `gather_slabs` takes."""

    value: Tensor


def group_of(sync: "bool | dist.ProcessGroup") -> "dist.ProcessGroup | None":
    """Return the group to merge over; None for all processes."""
    return None if isinstance(sync, bool) else sync


def merging_ranks(sync: "bool | dist.ProcessGroup") -> int:
    """Return the number of processes that merge: 1 if this one is alone, -1 if it is not in the group."""
    return ranks(group_of(sync)) if sync else 1


def is_first_rank(sync: "bool | dist.ProcessGroup") -> bool:
    """Whether this process writes the record, because it is the first of those that merge."""
    return merging_ranks(sync) <= 1 or dist.get_rank(group_of(sync)) == 0


def merge_over_ranks(
    sync: "bool | dist.ProcessGroup", bands: Sequence[Gathered], loss: Tensor
) -> tuple[list[Gathered], Tensor]:
    r"""Merge what all ranks gathered in a step, as if one process had seen the whole batch.

    - Moments, and detail moments where there are any, merge by Chan's rule.
    - Gradients are the mean over ranks, as DDP and FSDP make them: those of the mean of the ranks' losses, which is the
      mean over the batch where the ranks' shares are alike. A layer that did not run on a rank adds 0 there.
    - The loss ``[1]`` is the mean over ranks. Running buffers are the first rank's: DDP broadcasts and checkpoints keep
      those.
    - The variance between ranks is :math:`\sum_r n_r (\mu_r - \mu)^2 / \sum_r n_r`.

    Returns:
        The merged bands, and the loss.
    """
    slabs: list[Any] = [_One(loss)]
    for band in bands:
        did_not_run = (band.moments.seen == 0)[:, None, None]
        slabs += [band.moments, _One(band.gradient.masked_fill(did_not_run & band.gradient.isnan(), 0))]
        slabs += [] if band.running is None else [_One(band.running)]
        slabs += [] if band.detail is None else [band.detail]
    everyone = iter(gather_slabs(slabs, group_of(sync)))
    of_loss = next(everyone).value.mean(0)
    merged = []
    for band in bands:
        moments, gradient = next(everyone), next(everyone).value.mean(0)
        between = variance_between(moments)
        running = None if band.running is None else next(everyone).value[0]
        detail = None if band.detail is None else merge_stacked_(next(everyone), merge_detail_)
        merged.append(Gathered(merge_stacked_(moments, merge_moments_), gradient, running, detail, between))
    return merged, of_loss


def gather_slabs(slabs: Sequence[Any], group: "dist.ProcessGroup | None" = None) -> list[Any]:
    """Gather named tuples of tensors ``[...]`` of all ranks, with one collective, as tensors ``[ranks, ...]``.

    Shapes and dtypes must be the same on all ranks.

    >>> gather_slabs([RawMoments(torch.ones(2), torch.ones(2, 9, 3), torch.ones(2, 7))])[0].channel.shape
    torch.Size([1, 2, 9, 3])
    """
    tensors = [tensor for slab in slabs for tensor in slab]
    # The widest dtype first, and rows of whole multiples of it: each part can then be read where it lies.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    flat = [tensors[i].contiguous().flatten().view(torch.uint8) for i in order]
    padding = -sum(map(len, flat)) % 8
    everyone = gather_in_group(torch.cat([*flat, flat[0].new_zeros(padding)]), group)
    parts, start = {}, 0
    for i, own in zip(order, flat, strict=True):
        part = everyone[:, start : start + len(own)].view(tensors[i].dtype)
        parts[i] = part.unflatten(1, tensors[i].shape) if tensors[i].ndim else part.flatten()
        start += len(own)
    in_order = iter(parts[i] for i in range(len(tensors)))
    return [type(slab)(*(next(in_order) for _ in slab)) for slab in slabs]


def merge_stacked_(slabs: Slab, merge_: Callable[[Slab, Slab], None]) -> Slab:
    """Merge along the first axis, in place and pairwise, so that many ranks take few operations: ``[W, ...] -> [...]``.

    Args:
        slabs: a named tuple of tensors with a leading axis.
        merge_: adds the second of two such to the first, in place.
    """
    count = len(slabs[0])

    def rows(start: int, stop: int) -> Slab:
        return type(slabs)(*(part[start:stop] for part in slabs))

    while count > 1:
        half = count // 2
        merge_(rows(0, half), rows(count - half, count))
        count -= half
    return type(slabs)(*(part[0] for part in slabs))


def variance_between(moments: RawMoments) -> Tensor:
    """Return the variance of the ranks' channel means, weighted by tokens: ``[W, L, ...] -> [L, C]``."""
    seen = moments.seen.double()
    share = (seen / seen.sum(0).clamp(min=1))[:, :, None]
    means = moments.channel[:, :, SHIFT_X].double() + moments.channel[:, :, REST_X].double()
    means = torch.where(share > 0, means, 0)
    return (share * (means - (share * means).sum(0)).square()).sum(0)


def of_first_rank(sync: "bool | dist.ProcessGroup", value: int) -> int:
    """Return the first rank's value, on all ranks that merge; every one of them calls this."""
    if merging_ranks(sync) <= 1:
        return value
    everyone: list[Any] = [None] * merging_ranks(sync)
    dist.all_gather_object(everyone, value, group=group_of(sync))
    return int(everyone[0])


def refuse_other_layers(sync: "bool | dist.ProcessGroup", watched: list[str]) -> None:
    """Raise StabNormError if ranks watch different layers; they would wait for ever, or mix up layers.

    Raises:
        StabNormError: another rank watches something else.
    """
    everyone: list[Any] = [None] * merging_ranks(sync)
    dist.all_gather_object(everyone, watched, group=group_of(sync))
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            only = sorted(set(theirs) ^ set(everyone[0])) or "the same in another order"
            raise StabNormError(
                f"rank {rank} watches other layers or statistics than rank 0 (only one of them has: {only}), and what "
                "ranks see is merged. Give every rank the same model, preset, include and exclude; or the processes "
                "that do have the same, as sync=group; or sync=False"
            )
