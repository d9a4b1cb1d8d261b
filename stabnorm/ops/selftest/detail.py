"""The comparisons of `stabnorm.ops.detail`."""

import torch

from stabnorm.functional.detail import DETAIL, REST, SHIFT, VAR, detail_moments
from stabnorm.ops.detail import accumulate_detail_, add_detail_, outliers_of_rows
from stabnorm.ops.selftest import Case, Results, halves, kept


@add_detail_.check
def details(case: Case) -> Results:
    """Run two forwards in which every row is a sequence."""
    rows, channels = case.x.shape
    if case.x.dtype == torch.float64:
        moments = detail_moments(case.x, rows, 1e-5, valid=case.valid)
    else:
        moments = DETAIL.one(channels, case.x.device)
        for part, x in halves(case.x):
            accumulate_detail_(x, None if case.valid is None else case.valid[part], *moments, -1)
    spread = kept(case, case.x.double()).var(0, correction=0).amax().sqrt() + 1
    sequences = moments.sequences.double()
    return {
        "seen": (moments.seen.double(), 0.0, False),
        "counts": (moments.counts.double(), 0.0, False),
        "tokens": (moments.means, 1.0, False),
        "mean of sequences": (sequences[SHIFT] + sequences[REST], spread, False),
        "variance of sequences": (sequences[VAR], spread.square(), False),
    }


@outliers_of_rows.check
def outliers(case: Case) -> Results:
    """Count the outliers of four times the rows, so that there are some."""
    tokens, counts = outliers_of_rows(4 * case.x, case.valid)
    return {"tokens": (tokens.double(), 0.0, False), "outliers": (counts.double(), 0.0, False)}
