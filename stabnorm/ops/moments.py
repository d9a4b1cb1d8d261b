"""The op behind every hook: add one forward's moments to a layer's accumulator, unless the forward is a recompute.

`accumulate_moments_` is `functional.raw_moments` followed by `functional.merge_moments_`. It is registered with the
dispatcher, so that in a compiled model it is one opaque node whose Python runs at run time. Only there can a recomputed
forward be recognised: `torch._C._current_graph_task_id` cannot be traced, and a flag that is read while tracing counts
`checkpoint(compiled_block)` twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stabnorm._models.hooks import counting_paused
from stabnorm._registration import returns_nothing
from stabnorm.functional import Kind, RawMoments, merge_moments_, normalize_groups, raw_moments
from stabnorm.norms.rows import as_rows
from stabnorm.ops.dispatch import op


class Request(NamedTuple):
    """What is gathered of one input.

    Attributes:
        kind: what the layer is.
        eps: the layer's epsilon.
        by_groups: ``[R, C]``, the rows normalised by a "group" or "instance" norm.
        variances: the variances that such a norm divides by.
        tokens: False leaves out the per-token statistics.
        normalized: False leaves out the moments of the normalised input.
        fresh: the accumulator is known to be empty, so a CPU backend need not merge.
    """

    kind: Kind
    eps: float
    by_groups: Tensor | None = None
    variances: Tensor | None = None
    tokens: bool = True
    normalized: bool = True
    fresh: bool = False


def is_recompute() -> bool:
    """Whether this forward runs inside a backward: then activation checkpointing repeats a forward already counted."""
    return torch._C._current_graph_task_id() != -1


def is_counted() -> bool:
    """Whether hooks count this forward: it is no recompute, and it is not run inside `uncounted`."""
    return not is_recompute() and not counting_paused()


@op(mutates=("seen", "channel", "token"), fake=returns_nothing)
def accumulate_moments_(
    x: Tensor,
    valid: Tensor | None,
    seen: Tensor,
    channel: Tensor,
    token: Tensor,
    kind: str,
    channel_dim: int,
    feature_dims: int = 1,
    groups: int = 1,
    eps: float = 1e-5,
    tokens: bool = True,
    normalized: bool = True,
    fresh: bool = False,
) -> None:
    """Merge the moments of ``x`` into ``seen``, ``channel``, ``token`` in place; a recomputed forward adds nothing.

    Args:
        x: a norm's input, any layout and floating dtype; computed in float32.
        valid: bool, x's shape without the channel axis, True = valid token; None means that all are valid.
        seen: int64 scalar, see `functional.RawMoments`; or ``[S]``, see `accumulators.empty_accumulators`.
        channel: ``[rows, C]`` float32, or ``[S, rows, C]``.
        token: ``[rows]`` float32, or ``[S, rows]``.
        kind: what the layer is, see `functional.Kind`.
        channel_dim: the axis of x that holds the channels.
        feature_dims: how many trailing axes the layer normalises together.
        groups: number of groups of a group or instance norm.
        eps: the layer's epsilon.
        tokens: see `Request`, as are the next two.
        normalized: False leaves out the moments of the normalised input.
        fresh: the accumulator is known to be empty.
    """
    if not is_counted() or x.numel() == 0:
        return
    x = x.detach()
    if x.dtype == torch.float64:
        x = x.float()
    rows, keep = as_rows(x, channel_dim, feature_dims), None if valid is None else valid.reshape(-1)
    by_groups = variances = None
    if kind in ("group", "instance") and (normalized or tokens):
        channels_first = (x if x.ndim != -channel_dim else x[None]).movedim(channel_dim, 1)
        by_groups, variances = normalize_groups(channels_first.float(), groups, eps)
        by_groups = as_rows(by_groups, 1) if normalized else None
    into = RawMoments(seen, channel, token)
    if seen.ndim == 1 and add_moments_.chosen(rows, keep) != "triton":
        into = RawMoments(seen[0], channel[0], token[0])  # the backend uses only the first split
    request = Request(kind, eps, by_groups, variances, tokens, normalized, fresh)  # type: ignore[arg-type]
    add_moments_(rows, keep, into, request)


@op("rows", observes=True)
def add_moments_(rows: Tensor, valid: Tensor | None, into: RawMoments, request: Request) -> None:
    """`functional.raw_moments` of ``rows [R, C]`` in any floating dtype but float64, added to ``into``.

    Args:
        rows: the norm's input.
        valid: ``[R]`` bool; None means that all are valid.
        into: one layer's accumulator.
        request: what is gathered; the formula gathers all.
    """
    n, divided_by = request.by_groups, request.variances
    new = raw_moments(rows.float(), request.kind, request.eps, normalized=n, divided_by=divided_by, valid=valid)
    merge_moments_(into, new)
