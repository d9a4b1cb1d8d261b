"""The comparison of `stabnorm.ops.accumulators`."""

import torch

from stabnorm import functional
from stabnorm.functional import RawMoments
from stabnorm.functional.moments import REST_X, SHIFT_X, VAR_N, VAR_X
from stabnorm.ops.accumulators import merge_accumulators, merge_splits
from stabnorm.ops.selftest import Case, Results


@merge_splits.check
def splits(case: Case) -> Results:
    """Merge the accumulators of two layers, with a split for each row; the split of a masked row is empty."""
    x = case.x[:200].nan_to_num(0).to(case.vectors.dtype)
    size, channels = x.shape
    parts = functional.empty_moments(2 * size, channels, x.device)
    parts = RawMoments(parts.seen, parts.channel.to(x.dtype), parts.token.to(x.dtype))
    seen = torch.arange(size, device=x.device) % 3 + 1
    parts.seen.copy_((seen if case.valid is None else seen * case.valid[:200]).repeat(2))
    parts.channel[:, SHIFT_X] = x.repeat(2, 1)
    parts.channel[:, VAR_X] = 1
    parts.channel[:, VAR_N] = 2
    parts.token.zero_()
    accumulators = RawMoments(*(part.unflatten(0, (2, size)) for part in parts))
    seen, channel, token = merge_accumulators(accumulators)
    spread = x.abs().amax().clamp(min=1)
    return {
        "seen": (seen.double(), 0.0, False),
        "mean": (channel[:, SHIFT_X].double() + channel[:, REST_X], spread, False),
        "variances": (channel[:, [VAR_X, VAR_N]], spread.square(), False),
        "tokens": (token, 1.0, False),
    }
