"""The one collective of this package: every rank gets every rank's small vector."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stabnorm._registration import registered


def ranks(group: "dist.ProcessGroup | None" = None) -> int:
    """Count the processes that train together, all or those of a group; 1 where `torch.distributed` is not set up."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


@registered(lambda x: x.new_empty((ranks(), *x.shape)))
def rank() -> int:
    """Return this process's number among those of `torch.distributed`, 0 where it is not used."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_over_ranks(x: Tensor) -> Tensor:
    """Stack every rank's ``x``: ``[...] -> [W, ...]``. It is not summed, so that ranks can merge by Chan's rule.

    >>> gather_over_ranks(torch.ones(3)).shape
    torch.Size([1, 3])
    """
    return gather_in_group(x)


def gather_in_group(x: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Do the same among the processes of a group, outside of compiled graphs. Default: all processes."""
    count = ranks(group)
    if count == 1:
        return x[None].clone()
    device = _gathering_device(x.device, group)
    everyone = torch.empty(count, *x.shape, dtype=x.dtype, device=device)
    dist.all_gather(list(everyone.unbind()), x.to(device).contiguous(), group=group)
    return everyone.to(x.device)


def _gathering_device(device: torch.device, group: "dist.ProcessGroup | None") -> torch.device:
    """Give a device on which the group can gather: gloo gathers on the host only, NCCL on GPUs only."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    if backends.get(device.type) not in (None, "gloo"):
        return device
    return torch.device("cpu" if "cpu" in backends else next(iter(backends)))


def is_distributed(x: Tensor) -> bool:
    """Whether it is a DTensor, of which this process has a part or a copy. The class is not imported for this."""
    return type(x).__name__ == "DTensor"


class Part(NamedTuple):
    """One process's part of a vector.

    Attributes:
        values: ``[stop - start]``.
        start, stop: the part's range in the whole vector.
        parts: the number of parts.
    """

    values: Tensor
    start: int
    stop: int
    parts: int


def own_part(x: Any) -> Part | None:
    """Give this process's part of a DTensor, flattened; None where it is no range of the whole, as it is under FSDP."""
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
