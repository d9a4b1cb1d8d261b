"""The one collective of a norm with `sync=True`: everybody's small vector, for everybody."""

import torch
import torch.distributed as dist
from torch import Tensor

_library = torch.library.Library("stabnorm", "FRAGMENT")
_library.define("gather_over_ranks(Tensor x) -> Tensor")


def ranks() -> int:
    """How many processes train together; 1 when none of it was set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_over_ranks(x: Tensor) -> Tensor:
    """Every rank's ``x``, stacked: ``[...] -> [W, ...]``. Gathered, not summed, so that ranks merge by Chan's rule.

    >>> gather_over_ranks(torch.ones(3)).shape
    torch.Size([1, 3])
    """
    if torch.compiler.is_compiling():
        return torch.ops.stabnorm.gather_over_ranks.default(x)  # type: ignore[no-any-return]
    return _gather(x)


def _gather(x: Tensor) -> Tensor:
    if ranks() == 1:
        return x[None].clone()
    parts = [torch.empty_like(x) for _ in range(ranks())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


_library.impl("gather_over_ranks", _gather, "CompositeExplicitAutograd")


@torch.library.register_fake("stabnorm::gather_over_ranks")  # type: ignore[untyped-decorator]
def _(x: Tensor) -> Tensor:
    return x.new_empty((ranks(), *x.shape))
