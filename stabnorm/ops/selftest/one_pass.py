"""The comparison of `stabnorm.ops.one_pass`."""

import torch

from stabnorm.ops.one_pass import affine_with_square, gradient_with_sums, redo_affine_, redo_gradient_
from stabnorm.ops.selftest import Case, Results, kept


@affine_with_square.check
def map_and_sums(case: Case) -> Results:
    """Compute map and sums together; then run the `redo_` ops with the flag set and not set."""
    _, scale, shift, slope, *_ = case.vectors.unbind()
    x, dy = (kept(case, t.double()) for t in (case.x, case.dy))
    y, moments = affine_with_square(case.x, case.valid, scale, shift)
    dx, sums = gradient_with_sums(case.dy, case.x, case.valid, scale, slope)
    results: Results = {"rows": (moments.rows, 0.0, False), "square": (moments.square, moments.square.amax(), False)}
    for name, total, terms in zip(("dy", "dy x", "dy of valid", "dy x of valid"), sums, (dy, dy * x) * 2, strict=True):
        results[name] = (total, terms.square().sum(0).sqrt() + 1e-3, False)
    of_y, of_dx = (x * scale).abs() + shift.abs(), (dy * scale).abs() + (x * slope).abs()
    for name, right in (("as guessed", True), ("done again", False)):
        flag, change = torch.tensor(right, device=x.device), 0 if right else 1
        redo_affine_(y, flag, case.x, scale + change, shift)
        redo_gradient_(dx, flag, case.dy, case.x, case.valid, scale + change, slope)
        results[f"y, {name}"] = (kept(case, y), of_y + x.abs(), True)
        results[f"dx, {name}"] = (kept(case, dx), of_dx + dy.abs(), True)
    return results


for one in (redo_affine_, gradient_with_sums, redo_gradient_):
    one.checks = affine_with_square.checks
