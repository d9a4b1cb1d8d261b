"""The op behind every hook: add one forward's moments to a layer's account, unless the forward is a recompute.

`accumulate_moments_` is `functional.raw_moments` followed by `functional.merge_moments_`. It is registered with the
dispatcher, so that in a compiled model it is one opaque node and its body runs in Python at run time. That is where a
recomputed forward must be recognised: `torch._C._current_graph_task_id` cannot be traced, and a flag that is read
while tracing counts `checkpoint(compiled_block)` twice.
"""

import torch
from torch import Tensor

from stabnorm import functional
from stabnorm.functional import Kind, RawMoments, empty_moments, merge_moments_, normalize_groups, raw_moments
from stabnorm.norms.rows import as_rows
from stabnorm.ops.dispatch import execution

_library = torch.library.Library("stabnorm", "DEF")
_library.define(
    "accumulate_moments_(Tensor x, Tensor? valid, Tensor(a!) seen, Tensor(b!) channel, Tensor(c!) token, str kind, "
    "int channel_dim, int feature_dims, int groups, float eps, bool tokens, bool normalized, bool fresh) -> ()"
)


def is_recompute() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing repeats one that was counted already."""
    return torch._C._current_graph_task_id() != -1


def accumulate_moments_(
    x: Tensor,
    valid: Tensor | None,
    seen: Tensor,
    channel: Tensor,
    token: Tensor,
    kind: Kind,
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
        valid: bool, x's shape without the channel axis, True = valid token; None: all are.
        seen: int64 scalar, see `functional.RawMoments`; or ``[S]``, an account in splits, see `empty_accounts`.
        channel: ``[9, C]`` float32, or ``[S, 9, C]``.
        token: ``[7]`` float32, or ``[S, 7]``.
        kind: what the layer is.
        channel_dim: the axis of x that holds the channels.
        feature_dims: how many trailing axes the layer normalises together.
        groups: a group or instance norm's groups.
        eps: the layer's epsilon.
        tokens: False leaves out the per-token statistics.
        normalized: False leaves out the moments of the normalised input.
        fresh: the account is known to be empty, so that on a CPU there is nothing to merge with.
    """
    if is_recompute() or x.numel() == 0:
        return
    x = x.detach()
    if x.dtype == torch.float64:
        x = x.float()
    keep = None if valid is None else valid.reshape(-1)
    into = RawMoments(seen, channel, token)
    grouped = kind in ("group", "instance")
    body = execution("accumulate_moments_", x, keep)
    if seen.ndim == 1 and body != "triton":
        into = RawMoments(seen[0], channel[0], token[0])  # one of the splits will do
    if body == "cpp" and not grouped:
        from stabnorm.ops.cpp import moments as _cpp_moments

        rows = as_rows(x, channel_dim, feature_dims)
        _cpp_moments.add_moments_of_rows_(into, rows, kind, eps, keep, tokens, normalized, fresh)
        return
    if x.dtype != torch.float32 and body != "triton":  # a kernel widens what it has read
        x = x.float()
    rows = as_rows(x, channel_dim, feature_dims)
    by_groups = variances = None
    if grouped and (normalized or tokens):
        channels_first = (x if x.ndim != -channel_dim else x[None]).movedim(channel_dim, 1)
        by_groups, variances = normalize_groups(channels_first.float(), groups, eps)
        by_groups = as_rows(by_groups, 1) if normalized else None
    if body == "triton":
        from stabnorm.ops.triton import moments as _triton_moments

        with torch.cuda.device_of(rows):  # a kernel is launched on the current device, whatever it is given
            _triton_moments.add_moments_of_rows_(into, rows, kind, eps, by_groups, variances, keep, tokens, normalized)
    elif body in ("aten", "cpp"):
        from stabnorm.ops.aten import moments as _cpu_moments

        _cpu_moments.add_moments_of_rows_(into, rows, kind, eps, by_groups, variances, keep, tokens, normalized, fresh)
    else:
        new = raw_moments(rows, kind, eps, normalized=by_groups, divided_by=variances, valid=keep)
        merge_moments_(into, new)


def empty_accounts(layers: int, channels: int, device: torch.device, splits: int = 0) -> RawMoments:
    """Accounts of layers for `accumulate_moments_` to fill: ``seen [L]``, or ``[L, S]`` where a kernel fills splits.

    Splits of a layer stay apart until `merge_accounts` merges those of all layers in one launch.

    Args:
        layers: L.
        channels: of the widest.
        device: where.
        splits: how many another kernel fills; 0: there is no other.

    >>> empty_accounts(2, 3, torch.device("cpu")).channel.shape
    torch.Size([2, 9, 3])
    """
    if execution("accumulate_moments_", torch.empty(1, device=device)) != "triton":
        return empty_moments(layers, channels, device)
    from stabnorm.ops.triton.moments import splits_of

    splits = splits or splits_of(channels, device)
    return RawMoments(*(p.unflatten(0, (layers, splits)) for p in empty_moments(layers * splits, channels, device)))


def merge_accounts(accounts: RawMoments) -> RawMoments:
    """One account for each layer, ``seen [L]``: `functional.merge_splits`, or the same where there are no splits."""
    if accounts.seen.ndim == 1:
        return accounts
    if execution("merge_accounts", accounts.channel) == "triton":
        from stabnorm.ops.triton import accumulators as _triton_accounts

        with torch.cuda.device_of(accounts.channel):
            return _triton_accounts.merge_splits(accounts)
    return functional.merge_splits(accounts)


_library.impl("accumulate_moments_", accumulate_moments_, "CompositeExplicitAutograd")


@torch.library.register_fake("stabnorm::accumulate_moments_")  # type: ignore[untyped-decorator]
def _(*args: object) -> None:
    return None
