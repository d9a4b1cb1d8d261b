"""The C++ backend of `moments`, see `moments.cpp`."""

import torch
from torch import Tensor

from stabnorm.functional import Kind, RawMoments
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
    call(
        "moments", rows, *shape_of(rows), maybe_whole(valid), KINDS[request.kind], request.tokens, request.normalized,
        request.eps, torch.get_num_threads(), *addresses(into),
    )  # fmt: skip


def addresses(into: RawMoments) -> tuple[Tensor, Tensor, int, Tensor]:
    """Return what C++ is told about one layer's accumulator."""
    return into.seen, into.channel, into.channel.stride(0), into.token
