"""The comparisons of `stabnorm.ops.blend`."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from stabnorm.ops.blend import blend, join_gradients
from stabnorm.ops.selftest import Case, Results


def at_both_ends(case: Case, op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Results:
    """Run the op at lam = 0 and 1, and between."""
    clean, results = case.x.nan_to_num(0), Results()
    for lam in (0.0, 0.3, 1.0):
        y = op(torch.tensor(lam, device=clean.device), clean, case.dy)
        results[f"lam {lam}"] = (y, clean.abs() + case.dy.abs(), True)
    return results


for op in (blend, join_gradients):
    op.check(functools.partial(at_both_ends, op=op))
