"""The comparison of `stabnorm.ops.groups`."""

from stabnorm.ops.groups import gradient_of_groups, scaled_groups
from stabnorm.ops.selftest import Case, Results, kept


@scaled_groups.check
def groups_of_three(case: Case) -> Results:
    """Scale three groups if three divides the number of channels, else one; forward and backward."""
    groups = 3 if case.x.shape[1] % 3 == 0 else 1
    y, r = scaled_groups(case.x, groups, 1e-5)
    dx = gradient_of_groups(case.dy, case.x, r, case.valid is not None)
    natural = kept(case, case.x.double()).abs().amax(1, keepdim=True)
    size = (
        case.dy.double().abs().amax(1, keepdim=True)
        * (1 + natural * natural)
        * r.double().nan_to_num(0).amax(1, keepdim=True)
    )
    return {
        "y": (kept(case, y), 1.0, True),
        "r": (kept(case, r), 1.0, False),
        "dx": (kept(case, dx), size, True),
    }


gradient_of_groups.checks = scaled_groups.checks
