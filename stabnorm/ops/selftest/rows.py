"""The comparisons of `stabnorm.ops.rows`."""

from stabnorm.ops.rows import (
    BatchMap,
    absolute_of_rows,
    affine_of_rows,
    gradient_of_rows,
    gradient_of_signs,
    moments_of_rows,
    sums_of_rows,
)
from stabnorm.ops.selftest import Case, Results, kept


@moments_of_rows.check
def batch_moments(case: Case) -> Results:
    """Compute the moments, centred and not centred."""
    results: Results = {}
    for center in (True, False):
        moments = moments_of_rows(case.x, case.valid, center=center)
        mean, square = moments.mean, moments.square
        results[f"rows, {center}"] = (moments.rows, 0.0, False)
        results[f"square, {center}"] = (square, square.amax(), False)
        if mean is not None:
            results["mean"] = (mean, square.sqrt() + mean.abs() / 10, False)
    return results


@absolute_of_rows.check
def absolute_deviations(case: Case) -> Results:
    """Sum up the deviations from a mean and from 0."""
    results: Results = {}
    for mean in (case.vectors[0], None):
        absolute, signs = absolute_of_rows(case.x, mean, case.valid)
        results[f"absolute, {mean is not None}"] = (absolute, 0.0, False)
        results[f"signs, {mean is not None}"] = (signs, 0.0, False)
    return results


@affine_of_rows.check
def affine_map(case: Case) -> Results:
    """Apply the map with and without a shift."""
    _, scale, shift, *_ = case.vectors.unbind()
    clean = case.x.nan_to_num(0)
    natural = (clean * scale).abs() + shift.abs()
    return {
        "with shift": (affine_of_rows(clean, scale, shift), natural, True),
        "without": (affine_of_rows(clean, scale, None), natural, True),
    }


@sums_of_rows.check
def upstream_sums(case: Case) -> Results:
    """Sum up with deviations from a mean and from 0."""
    results: Results = {}
    for mean in (case.vectors[0], None):
        names = ("dy", "dy x", "dy of valid", "dy x of valid")
        sums = sums_of_rows(case.dy, case.x, mean, case.valid)
        x = case.x.double().nan_to_num(0)
        product = case.dy.double() * (x if mean is None else x - mean)
        for name, result in zip(names, sums, strict=True):
            terms = product if "x" in name else case.dy.double()
            results[f"{name}, {mean is not None}"] = (result, terms.square().sum(0).sqrt() + 1e-3, False)
    return results


@gradient_of_rows.check
@gradient_of_signs.check
def input_gradient(case: Case) -> Results:
    """Compute the gradients, centred and not centred; the gradient of padding is not compared."""
    mean, scale, _, slope, offset, _ = case.vectors.unbind()
    results: Results = {}
    for name, m, o in (("centred", mean, offset), ("not centred", None, None)):
        of = BatchMap(scale, slope, o, m)
        dx = kept(case, gradient_of_rows(case.dy, case.x, case.valid, of))
        by_signs = kept(case, gradient_of_signs(case.dy, case.x, case.valid, of))
        results[f"{name}, signs"] = (by_signs, (case.dy * scale).abs() + slope.abs() + offset.abs(), True)
        natural = (case.dy * scale).abs() + (case.x.nan_to_num(0) * slope).abs() + (mean * slope).abs() + offset.abs()
        results[name] = (dx, natural, True)
    return results
