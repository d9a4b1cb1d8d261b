"""The comparisons of `stabnorm.ops.moments`, and the figures of an accumulator."""

import functools

import torch

from stabnorm import functional
from stabnorm.functional import Kind, RawMoments
from stabnorm.functional.moments import (
    CHANNEL_ROWS,
    COV_XN,
    MAX,
    MIN,
    RAW,
    REST_N,
    REST_X,
    SHIFT_N,
    SHIFT_X,
    VAR_N,
    VAR_X,
)
from stabnorm.ops.moments import accumulate_moments_, add_moments_
from stabnorm.ops.selftest import Case, Results, halves


def raw_moments(case: Case, kind: Kind) -> Results:
    """Gather the moments of two forwards of a norm of this kind."""
    channels = case.x.shape[1]
    if case.x.dtype == torch.float64:
        moments = functional.raw_moments(case.x, kind, 1e-5, normalized=None, valid=case.valid)
    else:
        moments = RAW.one(channels, case.x.device)
        for part, x in halves(case.x):
            accumulate_moments_(x, None if case.valid is None else case.valid[part], *moments, kind, -1)
    return of_accumulator(case, moments)


def of_accumulator(case: Case, moments: RawMoments) -> Results:
    """Return every figure of one layer's accumulator."""
    channel, token = moments.channel.double(), moments.token.double()
    largest = case.x.double().nan_to_num(0).abs().amax().clamp(min=1)
    spread = channel[VAR_X].amax().sqrt().clamp(min=1)
    named = (SHIFT_X, REST_X, SHIFT_N, REST_N, VAR_X, COV_XN, VAR_N, MAX, MIN)
    return {
        "seen": (moments.seen.double(), 0.0, False),
        "mean of x": (channel[SHIFT_X] + channel[REST_X], spread, False),
        "mean of n": (channel[SHIFT_N] + channel[REST_N], 1.0, False),
        "variance of x": (channel[VAR_X], spread.square(), False),
        "covariance": (channel[COV_XN], spread, False),
        "variance of n": (channel[VAR_N], 1.0, False),
        "extremes": (channel[[MAX, MIN]], 0.0, False),
        "others": (channel[[row for row in range(CHANNEL_ROWS) if row not in named]], 1.0, False),
        "tokens": (token, spread if largest < 1e3 else spread * 1e2, False),
    }


KINDS: tuple[Kind, ...] = ("layer", "rms", "batch")
for kind in KINDS:
    add_moments_.check(functools.partial(raw_moments, kind=kind))
