"""The C++ backend of `observed`, see `moments.cpp` and `norm.cpp`."""

import torch
from torch import Tensor

from stabnorm.functional import RawMoments
from stabnorm.ops.cpp.library import call, like, maybe_vector, maybe_whole, shape_of
from stabnorm.ops.cpp.moments import KINDS, addresses
from stabnorm.ops.observed import NormKind, Spec, norm_gradient, norm_with_moments


@norm_with_moments.backend("cpp")
def norm(
    rows: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    spec: Spec,
    y: Tensor,
    into: RawMoments,
    valid: Tensor | None,
    add: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.observed.norm_with_moments`; it gathers all moments, also those that `spec` leaves out."""
    rows = rows.contiguous()
    means, rstds = rows.new_empty(2, len(rows), dtype=torch.float32)
    call(
        "observed", rows, *shape_of(rows), maybe_whole(valid), KINDS[spec.kind], spec.eps, add,
        torch.get_num_threads(), *addresses(into), maybe_vector(gain), maybe_vector(bias), y, means, rstds,
    )  # fmt: skip
    return means, rstds


@norm_gradient.backend("cpp")
def gradient(
    dy: Tensor, rows: Tensor, gain: Tensor | None, means: Tensor, rstds: Tensor, kind: NormKind
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.observed.norm_gradient`."""
    rows = rows.contiguous()
    dx, out = torch.empty_like(rows), rows.new_empty(2, rows.shape[1], dtype=torch.float32)
    call(
        "norm_gradient", like(rows, dy), rows, *shape_of(rows), kind == "rms", means, rstds, maybe_vector(gain),
        torch.get_num_threads(), dx, out,
    )  # fmt: skip
    return dx, out[0], out[1]
