"""The C++ backend of `detail`, see `detail.cpp`."""

import torch
from torch import Tensor

from stabnorm.functional.detail import DetailMoments, smallest
from stabnorm.ops.cpp.library import call, maybe_whole, shape_of
from stabnorm.ops.detail import DetailRequest, add_detail_, outliers_of_rows


@add_detail_.backend("cpp", in_graphs=True)
def add_detail_of_rows_(rows: Tensor, valid: Tensor | None, into: DetailMoments, request: DetailRequest) -> None:
    """See `ops.detail.add_detail_`."""
    rows = rows.contiguous()
    call(
        "detail", rows, *rows.shape, request.batch, maybe_whole(valid), smallest(request.eps), request.tokens,
        request.values, request.sequences, torch.get_num_threads(), into.seen, into.counts, into.means,
        into.sequences, into.sequences.stride(0),
    )  # fmt: skip


@outliers_of_rows.backend("cpp", in_graphs=True)
def outlier_counts(rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `functional.detail.outlier_counts`."""
    rows = rows.contiguous()
    outliers = torch.zeros(rows.shape[1], dtype=torch.int64, device=rows.device)
    tokens = call("outliers", rows, *shape_of(rows), maybe_whole(valid), torch.get_num_threads(), outliers)
    return torch.tensor(tokens, device=rows.device), outliers
