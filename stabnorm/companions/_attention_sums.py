"""Entropy and largest logit of each attention head: the formula, and the op that adds one call to a module's heads.

As in `stabnorm.ops.moments`, the op is opaque to the compiler. So its code runs at run time, where a recompute of
activation checkpointing can be recognised. A recomputed call adds nothing.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stabnorm._registration import returns_nothing
from stabnorm.companions.companion import merged, sampled, wide
from stabnorm.ops.dispatch import op
from stabnorm.ops.moments import is_counted

HIDDEN = -5e3  # a key counts as hidden if a mask lowers its logit by more; masks use -1e4, -1e9, -inf, ...


class AttentionSums(NamedTuple):
    """Sums over the queries of a step, ``[heads]`` each; a query that sees fewer than two keys does not count.

    Attributes:
        queries: number of queries.
        entropy: sum of their entropies, in nats.
        entropy_share: sum of entropy / log(number of visible keys).
        logit: the largest magnitude of a visible logit.
    """

    queries: Tensor
    entropy: Tensor
    entropy_share: Tensor
    logit: Tensor

    def merge(self, other: "AttentionSums") -> "AttentionSums":
        """Merge the sums of two micro-batches, devices or ranks: sums are added, and the larger logit is kept."""
        return merged(self, other, "logit")

    def add_(self, other: "AttentionSums") -> None:
        """Do the same in place."""
        for part, new in zip(self, self.merge(other), strict=True):
            part.copy_(new)


def sums_of_logits(logits: Tensor, biased: Tensor, visible: Tensor | None, valid: Tensor | None) -> AttentionSums:
    """Sum up the attention of some queries.

    Args:
        logits: ``[batch..., heads, queries, keys]``, scaled, without any mask.
        biased: the same plus the values of a mask that adds finite values.
        visible: bool, broadcastable to `logits`, which keys a query sees; None means all.
        valid: bool ``[batch..., queries]``, which queries count; None means all.
    """
    if visible is None:
        keys = torch.full(logits.shape[:-1], logits.shape[-1], device=logits.device)
        magnitude = logits.abs().amax(-1)
    else:
        keys = visible.expand(*visible.shape[:-1], logits.shape[-1]).sum(-1)
        biased = biased.masked_fill(~visible, -torch.inf)
        magnitude = logits.abs().masked_fill(~visible, 0).amax(-1)
    counted = keys >= 2
    if valid is not None:
        counted = counted & valid.unsqueeze(-2)
    # A row that sees nothing is NaN, and taken out below; 0 x -inf is nothing where only a key is not seen.
    log_weights = biased.log_softmax(-1)
    entropy = -(log_weights.exp() * log_weights.clamp(min=-1e4)).sum(-1)
    share = entropy / keys.clamp(min=2).to(entropy.dtype).log()
    heads = logits.shape[-3]
    dtype = wide(logits.device)

    def per_head(values: Tensor) -> Tensor:
        return torch.where(counted, values, 0).movedim(-2, 0).reshape(heads, -1)

    return AttentionSums(
        per_head(torch.ones_like(entropy)).sum(-1, dtype=dtype),
        per_head(entropy).sum(-1, dtype=dtype),
        per_head(share).sum(-1, dtype=dtype),
        per_head(magnitude).amax(-1).to(dtype),
    )


def sums_of_call(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    grouped: bool = False,
    at_most: int | None = None,
) -> AttentionSums:
    """Sum up one call of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: ``[batch..., heads, queries, features]``.
        key: ``[batch..., heads or groups, keys, features]``.
        mask: bool with True = visible, or values that are added to the logits.
        valid: bool ``[batch..., queries]``, which queries count.
        scale: factor of the logits. Default: 1 / sqrt(features).
        causal: whether query i sees only keys 0 to i.
        grouped: whether several heads share a key head (grouped-query attention).
        at_most: number of queries of each sequence to use, evenly spaced. Default: all.
    """
    length = query.shape[-2]
    positions = sampled(length, at_most)
    query, key = query[..., positions, :].float(), key.float()
    if grouped and query.shape[-3] != key.shape[-3]:
        shared = query.unflatten(-3, (key.shape[-3], -1)) @ key.unsqueeze(-3).transpose(-2, -1)
        products = shared.flatten(-4, -3)
    else:
        products = query @ key.transpose(-2, -1)
    logits = biased = products * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    visible = None
    if mask is not None:
        rows = mask[..., positions, :] if mask.ndim > 1 and mask.shape[-2] == length else mask
        visible = rows if rows.dtype == torch.bool else rows > HIDDEN
        biased = logits if rows.dtype == torch.bool else logits + rows
    if causal:
        places = torch.arange(length, device=logits.device)[positions]
        past = torch.arange(logits.shape[-1], device=logits.device) <= places[:, None]
        visible = past if visible is None else visible & past
    return sums_of_logits(logits, biased, visible, None if valid is None else valid[..., positions])


@op(mutates=("sums",), fake=returns_nothing)
def accumulate_attention_(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    valid: Tensor | None,
    scale: float | None,
    causal: bool,
    grouped: bool,
    at_most: int | None,
    sums: AttentionSums,
) -> None:
    """Add a call to the sums, in place, see `sums_of_call`."""
    if not is_counted() or query.numel() == 0 or key.numel() == 0:
        return
    with torch.autocast(query.device.type, enabled=False):
        sums.add_(sums_of_call(query, key, mask, valid, scale, causal, grouped, at_most))


@op(mutates=("sums",), fake=returns_nothing)
def accumulate_attention_logits_(
    logits: Tensor, valid: Tensor | None, at_most: int | None, sums: AttentionSums
) -> None:
    """Add the input of a softmax, ``[batch..., heads, queries, keys]``; masks have been added to it already."""
    if not is_counted() or logits.numel() == 0:
        return
    positions = sampled(logits.shape[-2], at_most)
    rows = logits[..., positions, :].float()
    sums.add_(sums_of_logits(rows, rows, rows > HIDDEN, None if valid is None else valid[..., positions]))
