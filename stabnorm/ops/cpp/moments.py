"""The C++ body of `moments`, see `cpp/moments.cpp`."""

import torch
from torch import Tensor

from stabnorm.functional import Kind, RawMoments, empty_moments, merge_moments_
from stabnorm.ops.cpp.library import TYPES, call

KINDS: dict[Kind, int] = {"batch": 0, "layer": 1, "rms": 2}


def add_moments_of_rows_(
    into: RawMoments,
    rows: Tensor,
    kind: Kind,
    eps: float,
    valid: Tensor | None,
    tokens: bool,
    normalized: bool,
    fresh: bool,
) -> None:
    """`functional.raw_moments` of ``rows [R, C]`` added to ``into``; ``fresh``: it is known to be empty."""
    rows = rows.contiguous()
    valid = None if valid is None else valid.contiguous()
    new = into if fresh else RawMoments(*(part[0] for part in empty_moments(1, rows.shape[1], torch.device("cpu"))))
    seen = call(
        "moments", rows, TYPES[rows.dtype], *rows.shape, valid, KINDS[kind], tokens, normalized, eps,
        torch.get_num_threads(), new.channel, new.channel.stride(0), new.token,
    )  # fmt: skip
    if seen:
        new.seen.fill_(seen)
        if not fresh:
            merge_moments_(into, new)
