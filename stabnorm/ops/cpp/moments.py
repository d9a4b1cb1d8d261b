"""The C++ backend of `moments`, see `moments.cpp`."""

import torch
from torch import Tensor

from stabnorm.functional import Kind, RawMoments, merge_moments_
from stabnorm.functional.moments import RAW
from stabnorm.ops.aten import moments as aten
from stabnorm.ops.cpp.library import call, maybe_whole, shape_of
from stabnorm.ops.moments import Request, add_moments_

KINDS: dict[Kind, int] = {"batch": 0, "layer": 1, "rms": 2}  # the kinds that the C++ code knows


@add_moments_.backend("cpp", in_graphs=True)
def add_moments_of_rows_(rows: Tensor, valid: Tensor | None, into: RawMoments, request: Request) -> None:
    """See `ops.moments.add_moments_`."""
    if request.kind not in KINDS:
        aten.add_moments_of_rows_(rows, valid, into, request)
        return
    rows = rows.contiguous()
    new = into if request.fresh else empty_moment(rows.shape[1])
    seen = call(
        "moments", rows, *shape_of(rows), maybe_whole(valid), KINDS[request.kind], request.tokens, request.normalized,
        request.eps, torch.get_num_threads(), new.channel, new.channel.stride(0), new.token,
    )  # fmt: skip
    take_in_(into, new, seen)


def empty_moment(channels: int) -> RawMoments:
    """Return the empty accumulator of one layer."""
    return RAW.one(channels, torch.device("cpu"))


def take_in_(into: RawMoments, new: RawMoments, seen: int) -> None:
    """Add what C++ has written into ``new`` to ``into``, which may be the same."""
    if seen:
        new.seen.fill_(seen)
        if new is not into:
            merge_moments_(into, new)
