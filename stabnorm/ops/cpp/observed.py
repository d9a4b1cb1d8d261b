"""The C++ body of `observed`, see `cpp/moments.cpp` and `cpp/norm.cpp`."""

import torch
from torch import Tensor

from stabnorm.functional import Kind, RawMoments, empty_moments, merge_moments_
from stabnorm.ops.cpp.library import TYPES, call
from stabnorm.ops.cpp.moments import KINDS


def norm(
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: Kind,
    y: Tensor,
    into: RawMoments,
    valid: Tensor | None,
    add: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.observed`; ``into`` is a plain account. Fills ``y``; mean and 1 / std of each token in float32."""
    rows = rows.contiguous()
    valid = None if valid is None else valid.contiguous()
    gain, offset = (None if t is None else t.detach().float().contiguous() for t in (weight, bias))
    means, rstds = rows.new_empty(2, len(rows), dtype=torch.float32)
    fresh = not (add and into.seen.numpy().any())  # in the host's own memory: nothing is waited for
    new = into if fresh else RawMoments(*(part[0] for part in empty_moments(1, rows.shape[1], rows.device)))
    seen = call(
        "observed", rows, TYPES[rows.dtype], *rows.shape, valid, KINDS[kind], eps, add, torch.get_num_threads(),
        new.channel, new.channel.stride(0), new.token, gain, offset, y, means, rstds,
    )  # fmt: skip
    if seen:
        new.seen.fill_(seen)
        if not fresh:
            merge_moments_(into, new)
    return means, rstds


def gradient(
    dy: Tensor, rows: Tensor, weight: Tensor | None, means: Tensor, rstds: Tensor, kind: Kind
) -> tuple[Tensor, Tensor, Tensor]:
    """Dx, and the sums of dy n and of dy."""
    rows, dy = rows.contiguous(), dy.to(rows.dtype).contiguous()
    gain = None if weight is None else weight.detach().float().contiguous()
    dx, out = torch.empty_like(rows), rows.new_empty(2, rows.shape[1], dtype=torch.float32)
    call(
        "norm_gradient", dy, rows, TYPES[rows.dtype], *rows.shape, kind == "rms", means, rstds, gain,
        torch.get_num_threads(), dx, out,
    )  # fmt: skip
    return dx, out[0], out[1]
