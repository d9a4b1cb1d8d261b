"""The formulas of the detail moments, which the costlier statistics need in addition to `RawMoments`.

Shape legend: R rows (tokens), C channels, B sequences (entries of the input's first axis). Every field is a sum, an
extreme, a mean or a mean with a variance, so that micro-batches and ranks merge exactly: `DETAIL` says which is which.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stabnorm.functional.accumulators import Field, Layout, Rows

OUTLIER = 6.0  # an output of at least this magnitude is an outlier (LLM.int8, arXiv 2208.07339)


class DetailMoments(NamedTuple):
    """What one forward adds to a layer's detailed accumulator; two of them merge exactly (`merge_detail_`).

    Attributes:
        seen: number of valid tokens, int64 scalar.
        counts: ``[5]`` int64: non-finite and zero elements of the input, sequences with a valid token, sum over
            sequences of their squared numbers of valid tokens, valid tokens of the output.
        outputs: ``[C]`` int64: number of tokens whose output has a magnitude of at least `OUTLIER` in the channel.
        range_bits: log2 of the largest finite number of the input's dtype, scalar; the least over all forwards.
        means: ``[3]``, means over tokens: median magnitude; largest over median magnitude; kurtosis.
        sequences: ``[3, C]``: mean over sequences of their means, as shift + rest, and variance around it, each
            sequence with the square of its number of tokens as weight.
    """

    seen: Tensor
    counts: Tensor
    outputs: Tensor
    range_bits: Tensor
    means: Tensor
    sequences: Tensor


def _seen(moments: DetailMoments) -> Tensor:
    return moments.seen


def _squares(moments: DetailMoments) -> Tensor:
    return moments.counts[..., SQUARES]


DETAIL = Layout(
    DetailMoments,
    seen=Field((Rows("sum"),), dtype=torch.int64),
    counts=Field((Rows("sum", ("NONFINITE", "ZEROS", "SEQUENCES", "SQUARES", "OUTPUTS")),), dtype=torch.int64),
    outputs=Field((Rows("sum"),), per_channel=True, dtype=torch.int64),
    range_bits=Field((Rows("min", empty=torch.inf),)),
    means=Field((Rows("mean_or_inf", ("MEDIAN", "MAX_TO_MEDIAN", "KURTOSIS")),), weighted_by=_seen),
    sequences=Field((Rows("moments", ("SHIFT", "REST", "VAR")),), per_channel=True, weighted_by=_squares),
)
NONFINITE, ZEROS, SEQUENCES, SQUARES, OUTPUTS = range(5)
MEDIAN, MAX_TO_MEDIAN, KURTOSIS = range(3)
SHIFT, REST, VAR = range(3)

empty_detail, clear_detail_, merge_detail_ = DETAIL.empty, DETAIL.clear_, DETAIL.merge_


def token_shape(rows: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return three figures of every token: ``rows [R, C] -> 3 x [R]``.

    They are the median magnitude, the largest magnitude over the median magnitude, and the kurtosis.

    .. math:: \mathrm{med}_c |x_c|,\quad \frac{\max_c |x_c|}{\max(\mathrm{med}_c |x_c|, \sqrt\epsilon)},\quad
              \frac{\mathrm{mean}_c (x_c - m)^4}{\max(v, \epsilon)^2}

    The norm itself cannot tell a variance far below eps from 0. Without the bound, a token of zeros has no ratio.

    >>> [round(float(t), 3) for t in token_shape(torch.tensor([[1.0, -1.0, 1.0, -9.0]]), 1e-5)]
    [1.0, 9.0, 2.218]
    """
    magnitudes = rows.abs().sort(-1).values
    median, largest = middle_and_last(magnitudes)
    mean = rows.mean(-1, keepdim=True)
    deviations = rows - mean
    deviations = deviations - deviations.mean(-1, keepdim=True)  # the rounding error of a mean far from 0
    squares = deviations.square()
    # Squares over the variance reach C at most: fourth powers would overflow.
    relative = squares / squares.mean(-1, keepdim=True).clamp(min=smallest(eps))
    return median, largest / median.clamp(min=smallest(eps) ** 0.5), relative.square().mean(-1)


def smallest(eps: float) -> float:
    """Return the least variance that counts: eps, or a tiny number if the norm has no eps."""
    return max(eps, torch.finfo(torch.float32).tiny)


def middle_and_last(ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Return the median and the largest of sorted ``[R, C]``; a NaN, which sorts last, makes both NaN."""
    channels = ascending.shape[-1]
    last = ascending[..., -1]
    median = 0.5 * (ascending[..., (channels - 1) // 2] + ascending[..., channels // 2])
    return torch.where(last.isnan(), last, median), last


def sequence_moments(rows: Tensor, batch: int, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of sequences, the sum of their squared lengths, and moments ``[3, C]`` of their means.

    Args:
        rows: ``[B P, C]``, sequence after sequence.
        batch: number of sequences, B.
        valid: ``[B P]`` bool; None means that all are valid.
    """
    length, channels = len(rows) // batch, rows.shape[1]
    if valid is None:  # all sequences have the same length and the same weight
        shift = rows.mean(0)
        means = (rows - shift).view(batch, length, channels).mean(1)
        rest = means.mean(0)
        count, squares = (torch.full((), n, device=rows.device) for n in (batch, batch * length**2))
        return count, squares, torch.stack([shift, rest, (means - rest).square().mean(0)])
    lengths = valid.view(batch, length).sum(1)
    shift = torch.where(valid[:, None], rows, 0).sum(0) / lengths.sum().clamp(min=1)
    centred = torch.where(valid[:, None], rows - shift, 0)
    means = centred.view(batch, length, channels).sum(1) / lengths.clamp(min=1)[:, None]
    squares = lengths.square()
    weights = (squares / squares.sum().clamp(min=1)).to(rows.dtype)[:, None]
    rest = (weights * means).sum(0)
    return (lengths > 0).sum(), squares.sum(), torch.stack([shift, rest, (weights * (means - rest).square()).sum(0)])


def detail_moments(
    rows: Tensor,
    batch: int,
    eps: float,
    *,
    valid: Tensor | None = None,
    tokens: bool = True,
    values: bool = True,
    sequences: bool = True,
) -> DetailMoments:
    """Return all that one forward adds to its detailed accumulator, except for its output.

    `stabnorm.ops.detail` computes the same.

    Args:
        rows: the norm's input as ``[R, C]``, R >= 1, float32 or float64, sequence after sequence.
        batch: number of sequences.
        eps: the layer's epsilon.
        valid: ``[R]`` bool. Default: None means that all are valid.
        tokens: False leaves out the means over tokens.
        values: False leaves out the counts of non-finite and zero elements.
        sequences: False leaves out the means of sequences.
    """
    keep = rows.new_ones(len(rows), dtype=torch.bool) if valid is None else valid
    new = DETAIL.one(rows.shape[1], rows.device)
    new = new._replace(means=new.means.to(rows.dtype), sequences=new.sequences.to(rows.dtype))
    new.seen.copy_(keep.sum())
    if values:
        for column, is_one in ((NONFINITE, ~rows.isfinite()), (ZEROS, rows == 0)):
            new.counts[column] = (is_one & keep[:, None]).sum()
    if tokens:
        size = new.seen.clamp(min=1)
        new.means.copy_(torch.stack([torch.where(keep, t, 0).sum() / size for t in token_shape(rows, eps)]))
    if sequences:
        new.counts[SEQUENCES], new.counts[SQUARES], moments = sequence_moments(rows, batch, valid)
        new.sequences.copy_(moments)
    return new


def outlier_counts(rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Count the valid rows of an output ``[R, C]``, and in each channel those with a magnitude of at least `OUTLIER`.

    >>> outlier_counts(torch.tensor([[1.0, -6.0], [0.0, 5.9]]), None)
    (tensor(2), tensor([0, 1]))
    """
    outliers = rows.abs() >= OUTLIER
    if valid is None:
        return torch.full((), len(rows), dtype=torch.int64, device=rows.device), outliers.sum(0)
    return valid.sum(), (outliers & valid[:, None]).sum(0)
