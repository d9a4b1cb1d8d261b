"""The op that computes the preset "standard" in one pass: all its statistics, what stands beside them, and the past.

The formula is the catalogue itself. On a CPU it takes some 250 small operations, whose calls take longer than their
arithmetic in all but very wide models; a backend is one call, or one launch, for each band of layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stabnorm.functional import Kind, RawMoments, raw_moments
from stabnorm.functional.moments import MIN, VAR_X
from stabnorm.monitor.past import Layout, Moments, Past
from stabnorm.monitor.rows import BESIDE_NORMS, RowLayout, beside_statistics
from stabnorm.monitor.statistics import CATALOGUE, PRESETS
from stabnorm.ops.dispatch import REFERENCE, op
from stabnorm.ops.selftest import Case, Results
from stabnorm.ops.standard import Layers

STANDARD = RowLayout(PRESETS["standard"], BESIDE_NORMS)  # the columns that the op fills


@op("channel", observes=True)
def standard_step(
    channel: Tensor, seen: Tensor, token: Tensor, gradient: Tensor, between: Tensor | None, past: Past
) -> Tensor:
    """Return the row of a band in a step, ``[L, columns]`` in float32, and add the step to the past.

    Args:
        channel: ``[L, rows, C]``, as `RawMoments` has it.
        seen: ``[L]``.
        token: ``[L, rows]``.
        gradient: ``[L, 2, C]``, see `Moments.gradient`.
        between: ``[L, C]``, variance of the ranks' means; None on one process.
        past: the layers' past, which changes.
    """
    now = Moments.of(RawMoments(seen, channel, token), gradient, past.layout, between)
    values = torch.stack([CATALOGUE[name].compute(now, past) for name in STANDARD.statistics], -1)
    values = torch.where(now.ran[:, None], values, torch.nan)
    row = STANDARD.pack(values, beside_statistics(now))
    past.update(now)
    return row


@standard_step.backend("cpp")
def standard_in_cpp(
    channel: Tensor, seen: Tensor, token: Tensor, gradient: Tensor, between: Tensor | None, past: Past
) -> Tensor:
    """See `standard_step`."""
    from stabnorm.ops.cpp.standard import standard

    return _in_one_pass(standard, channel, seen, token, gradient, between, past)


@standard_step.backend("triton")
def standard_in_triton(
    channel: Tensor, seen: Tensor, token: Tensor, gradient: Tensor, between: Tensor | None, past: Past
) -> Tensor:
    """See `standard_step`."""
    from stabnorm.ops.triton.standard import standard

    return _in_one_pass(standard, channel, seen, token, gradient, between, past)


def _in_one_pass(
    kernel: Callable[..., None],
    channel: Tensor,
    seen: Tensor,
    token: Tensor,
    gradient: Tensor,
    between: Tensor | None,
    past: Past,
) -> Tensor:
    layout, row = past.layout, channel.new_empty(len(channel), STANDARD.width)
    layers = Layers(layout.channels, layout.eps, layout.per_channel, layout.own_buffers)
    kernel(seen, channel, token, gradient, between, layers, past.own, past.channel, past.layer, row)
    return row


def has_backend(channel: Tensor) -> bool:
    """Whether something faster than the formula runs for such moments."""
    return standard_step.chosen(channel) != REFERENCE


# --- the comparison of the self-test ---


@standard_step.check
def standard_steps(case: Case) -> Results:
    """Take six steps of three layers: the second is a batch norm and narrower, the third does not always run.

    In one step, a channel is not finite. In some steps there are ranks.
    """
    x, width = case.x.float(), case.x.shape[1]  # in float32 for the formula, too: the statistics amplify its rounding
    kinds: tuple[Kind, ...] = ("layer", "batch", "rms")
    sizes = torch.tensor([width, max(1, width - 1), width], device=x.device)
    exists = torch.arange(width, device=x.device) < sizes[:, None]
    batch = torch.tensor([False, True, False], device=x.device)
    past = Past(Layout(exists, sizes.double(), torch.full_like(sizes, 1e-5, dtype=torch.float64), batch, batch), width)
    results: Results = {}
    for step in range(6):
        past.own = past.channel.new_full((3, 2, width), 0.5 + step)
        moments = [raw_moments((1 + step % 3) * x + step, kind, 1e-5) for kind in kinds]
        seen, channel, token = (torch.stack(parts) for parts in zip(*moments, strict=True))
        seen[2] *= step % 2
        channel = channel.masked_fill(~exists[:, None], 0)
        if step == 3:
            channel[0, VAR_X : MIN + 1, width // 2] = torch.nan
        gradient = case.vectors[:6].float().view(3, 2, width) * (step + 1)
        between = channel[:, VAR_X].double() / 2 if step % 2 else None
        row = standard_step(channel, seen, token, gradient, between, past)
        ids = STANDARD.part(row, "top_channel_ids")
        ids.copy_(ids.isnan())  # channels may be equally large
        results[f"step {step}"] = (row.nan_to_num(-1.0), 1.0, False)
    for name, values in past.channel_rows().items():  # beyond a layer's channels stands anything
        results[name] = (torch.where(exists[:, None], values, 0).nan_to_num(-1.0), 1.0, False)
    for name, values in past.layer_rows().items():
        results[name] = (values.nan_to_num(-1.0), 1.0, False)
    return results
