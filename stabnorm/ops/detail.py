"""The ops behind the detailed account: `functional_detail` on a norm's input, and on its output.

Like `stabnorm.ops.moments`: registered with the dispatcher, opaque to a compiler; a recomputed forward adds nothing.
"""

import math

import torch
from torch import Tensor

from stabnorm.functional.detail import OUTPUTS, DetailMoments, detail_moments, merge_detail_, outlier_counts
from stabnorm.norms.rows import as_rows
from stabnorm.ops.moments import is_recompute

_library = torch.library.Library("stabnorm", "FRAGMENT")
_library.define(
    "accumulate_detail_(Tensor x, Tensor? valid, Tensor(a!) seen, Tensor(b!) counts, Tensor(c!) outputs, "
    "Tensor(d!) range_bits, Tensor(e!) means, Tensor(f!) sequences, int channel_dim, int feature_dims, float eps, "
    "bool token_means, bool value_counts, bool sequence_means) -> ()"
)
_library.define(
    "count_outliers_(Tensor y, Tensor? valid, Tensor(a!) counts, Tensor(b!) outputs, int channel_dim, "
    "int feature_dims) -> ()"
)


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
    """Merge the detail moments of ``x`` into a layer's account in place; a recomputed forward adds nothing.

    Args:
        x: a norm's input, any layout and floating dtype; computed in float32.
        valid: bool, x's shape without the channel axis, True = valid token; None: all are.
        seen: int64 scalar; this and the next five are the account, see `functional_detail.DetailMoments`.
        counts: ``[5]`` int64.
        outputs: ``[C]`` int64, which is `count_outliers_`'s.
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
    if is_recompute() or x.numel() == 0:
        return
    x = x.detach()
    rows = as_rows(x.float(), channel_dim, feature_dims)
    no_batch = x.ndim == feature_dims if feature_dims > 1 else channel_dim % x.ndim == 0
    batch = 1 if no_batch else x.shape[0]
    keep = None if valid is None else valid.reshape(-1)
    into = DetailMoments(seen, counts, outputs, range_bits, means, sequences)
    if rows.device.type == "cpu":
        from stabnorm.ops.aten.detail import add_detail_of_rows_

        add_detail_of_rows_(into, rows, batch, eps, keep, token_means, value_counts, sequence_means)
    else:
        new = detail_moments(
            rows, batch, eps, valid=keep, tokens=token_means, values=value_counts, sequences=sequence_means
        )
        merge_detail_(into, new)
    range_bits.clamp_(max=math.log2(torch.finfo(x.dtype).max))


def count_outliers_(
    y: Tensor, valid: Tensor | None, counts: Tensor, outputs: Tensor, channel_dim: int, feature_dims: int = 1
) -> None:
    """Add the outlying entries of a norm's output to a layer's account in place; a recomputed forward adds nothing.

    Args:
        y: the output, in the layout of the input.
        valid: as for `accumulate_detail_`.
        counts: of the account.
        outputs: of the account.
        channel_dim: the axis of y that holds the channels.
        feature_dims: how many trailing axes the layer normalises together.
    """
    if is_recompute() or y.numel() == 0:
        return
    rows = as_rows(y.detach(), channel_dim, feature_dims)
    keep = None if valid is None else valid.reshape(-1)
    if rows.device.type == "cpu":
        from stabnorm.ops.aten.detail import outlier_counts_of_rows

        tokens, found = outlier_counts_of_rows(rows, keep)
    else:
        tokens, found = outlier_counts(rows, keep)
    counts[OUTPUTS] += tokens
    outputs.add_(found)


_library.impl("accumulate_detail_", accumulate_detail_, "CompositeExplicitAutograd")
_library.impl("count_outliers_", count_outliers_, "CompositeExplicitAutograd")


@torch.library.register_fake("stabnorm::accumulate_detail_")  # type: ignore[untyped-decorator]
def _(*args: object) -> None:
    return None


@torch.library.register_fake("stabnorm::count_outliers_")  # type: ignore[untyped-decorator]
def _(*args: object) -> None:
    return None
