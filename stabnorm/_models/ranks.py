"""The one collective of this package: everybody's small vector, for everybody."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_library = torch.library.Library("stabnorm", "FRAGMENT")
_library.define("gather_over_ranks(Tensor x) -> Tensor")


def ranks(group: "dist.ProcessGroup | None" = None) -> int:
    """How many processes train together, all or those of a group; 1 when none of it was set up."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def gather_over_ranks(x: Tensor) -> Tensor:
    """Every rank's ``x``, stacked: ``[...] -> [W, ...]``. Gathered, not summed, so that ranks merge by Chan's rule.

    >>> gather_over_ranks(torch.ones(3)).shape
    torch.Size([1, 3])
    """
    if torch.compiler.is_compiling():
        return torch.ops.stabnorm.gather_over_ranks.default(x)  # type: ignore[no-any-return]
    return gather_in_group(x)


def gather_in_group(x: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """The same among the processes of a group, outside of graphs. Default: all."""
    count = ranks(group)
    if count == 1:
        return x[None].clone()
    meet = _meeting_place(x.device, group)
    everyone = torch.empty(count, *x.shape, dtype=x.dtype, device=meet)
    dist.all_gather(list(everyone.unbind()), x.to(meet).contiguous(), group=group)
    return everyone.to(x.device)


def _meeting_place(device: torch.device, group: "dist.ProcessGroup | None") -> torch.device:
    """Where the group can gather: gloo does so on the host only, NCCL on GPUs only."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    if backends.get(device.type) not in (None, "gloo"):
        return device
    return torch.device("cpu" if "cpu" in backends else next(iter(backends)))


_library.impl("gather_over_ranks", gather_in_group, "CompositeExplicitAutograd")


@torch.library.register_fake("stabnorm::gather_over_ranks")  # type: ignore[untyped-decorator]
def _(x: Tensor) -> Tensor:
    return x.new_empty((ranks(), *x.shape))


def is_distributed(x: Tensor) -> bool:
    """Whether it is a DTensor, of which this process has a part or a copy; torch is not asked to load that class."""
    return type(x).__name__ == "DTensor"


class Part(NamedTuple):
    """What one process has of a vector.

    Attributes:
        values: ``[stop - start]``.
        start, stop: where in the whole vector.
        parts: how many there are of the same kind.
    """

    values: Tensor
    start: int
    stop: int
    parts: int


def own_part(x: Any) -> Part | None:
    """This process's part of a DTensor, flattened; None where it is no range of the whole, as under FSDP it is."""
    sharded = [mesh_dim for mesh_dim, placement in enumerate(x.placements) if not placement.is_replicate()]
    values: Tensor = x.to_local().flatten()
    if not sharded:
        return Part(values, 0, len(values), 1)
    mesh_dim = sharded[0]
    if len(sharded) > 1 or not x.placements[mesh_dim].is_shard(0):
        return None
    parts = x.device_mesh.size(mesh_dim)
    rows_per_part = -(-x.shape[0] // parts)
    start = min(x.device_mesh.get_local_rank(mesh_dim) * rows_per_part, x.shape[0]) * x.shape[1:].numel()
    return Part(values, start, start + len(values), parts)
