"""The ops that fill the detailed accumulators: `functional.detail` on a norm's input and on its output.

As in `stabnorm.ops.moments`, the outer ops are registered with the dispatcher, and a recomputed forward adds nothing.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stabnorm._registration import returns_nothing
from stabnorm.functional.detail import OUTPUTS, DetailMoments, detail_moments, merge_detail_, outlier_counts
from stabnorm.norms.rows import as_rows
from stabnorm.ops.dispatch import op
from stabnorm.ops.moments import is_counted


class DetailRequest(NamedTuple):
    """What is gathered of one input: arguments of `functional.detail_moments`."""

    batch: int
    eps: float
    tokens: bool
    values: bool
    sequences: bool


@op(mutates=("seen", "counts", "outputs", "range_bits", "means", "sequences"), fake=returns_nothing)
def accumulate_detail_(
    x: Tensor,
    valid: Tensor | None,
    seen: Tensor,
    counts: Tensor,
    outputs: Tensor,
    range_bits: Tensor,
    means: Tensor,
    sequences: Tensor,
    channel_dim: int,
    feature_dims: int = 1,
    eps: float = 1e-5,
    token_means: bool = True,
    value_counts: bool = True,
    sequence_means: bool = True,
) -> None:
    """Merge the detail moments of ``x`` into a layer's accumulator in place; a recomputed forward adds nothing.

    Args:
        x: a norm's input, any layout and floating dtype; computed in float32.
        valid: bool, x's shape without the channel axis, True = valid token; None: all are.
        seen: int64 scalar; this and the next five are the accumulator, see `functional.detail.DetailMoments`.
        counts: ``[5]`` int64.
        outputs: ``[C]`` int64, which `count_outliers_` fills.
        range_bits: float32 scalar.
        means: ``[3]`` float32.
        sequences: ``[3, C]`` float32.
        channel_dim: the axis of x that holds the channels. Sequences are the entries of its first axis; where that
            holds the channels, all is one sequence.
        feature_dims: how many trailing axes the layer normalises together.
        eps: the layer's epsilon.
        token_means: False leaves out `means`.
        value_counts: False leaves out the counts of non-finite and zero elements.
        sequence_means: False leaves out `sequences` and their counts.
    """
    if not is_counted() or x.numel() == 0:
        return
    x = x.detach()
    rows = as_rows(x.float(), channel_dim, feature_dims)
    no_batch = x.ndim == feature_dims if feature_dims > 1 else channel_dim % x.ndim == 0
    batch = 1 if no_batch else x.shape[0]
    keep = None if valid is None else valid.reshape(-1)
    into = DetailMoments(seen, counts, outputs, range_bits, means, sequences)
    add_detail_(rows, keep, into, DetailRequest(batch, eps, token_means, value_counts, sequence_means))
    range_bits.clamp_(max=math.log2(torch.finfo(x.dtype).max))


@op("rows", observes=True)
def add_detail_(rows: Tensor, valid: Tensor | None, into: DetailMoments, request: DetailRequest) -> None:
    """`functional.detail_moments` of float32 ``rows [R, C]`` added to ``into``."""
    merge_detail_(into, detail_moments(rows, valid=valid, **request._asdict()))


@op(mutates=("counts", "outputs"), fake=returns_nothing)
def count_outliers_(
    y: Tensor, valid: Tensor | None, counts: Tensor, outputs: Tensor, channel_dim: int, feature_dims: int = 1
) -> None:
    """Add the outlying entries of a norm's output to a layer's accumulator in place; a recomputed forward adds nothing.

    Args:
        y: the output, in the layout of the input.
        valid: as for `accumulate_detail_`.
        counts: of the accumulator.
        outputs: of the accumulator.
        channel_dim: the axis of y that holds the channels.
        feature_dims: how many trailing axes the layer normalises together.
    """
    if not is_counted() or y.numel() == 0:
        return
    rows = as_rows(y.detach(), channel_dim, feature_dims)
    keep = None if valid is None else valid.reshape(-1)
    tokens, outliers = outliers_of_rows(rows, keep)
    counts[OUTPUTS] += tokens
    outputs.add_(outliers)


@op("rows", observes=True)
def outliers_of_rows(rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """`functional.outlier_counts` of ``rows [R, C]`` in any floating dtype."""
    return outlier_counts(rows, valid)
