"""The comparison of `stabnorm.ops.running`."""

import torch

from stabnorm.ops.running import track_batch_
from stabnorm.ops.selftest import Case, Results


@track_batch_.check
def three_batches(case: Case) -> Results:
    """Track three batches, one of them not finite, as RepBN does: centred or not, moving or plain average."""
    results: Results = {}
    means, squares, device = case.vectors[:3], case.vectors[3:].square(), case.x.device
    for center, momentum in ((True, 0.1), (False, -1.0)):
        running = torch.zeros_like(means[0]), torch.ones_like(means[0])
        step, skips, progress = (torch.zeros(size, dtype=torch.int64, device=device) for size in ((), (), 3))
        for number, (mean, square) in enumerate(zip(means, squares, strict=True)):
            square = torch.where(torch.tensor(number == 1, device=device), torch.nan, square)
            count = torch.full((), 5.0 + number, device=device, dtype=square.dtype)
            means_ = (mean, running[0]) if center else (None, None)
            track_batch_(
                means_[0], square, count, means_[1], running[1], None, step, skips, progress, 8, momentum, 1e-5, True
            )
        counters = torch.stack([step, skips, *progress]).double()
        natural = means.abs().amax() + squares.amax() + 1
        results |= {
            f"mean, {center}": (running[0], natural, False),
            f"variance, {center}": (running[1], natural, False),
            f"counters, {center}": (counters, 0.0, False),
        }
    return results
