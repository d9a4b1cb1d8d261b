"""The kernels of a hook and of a step equal `functional` in float64; see tests/triton_kernels.py."""

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, functional
from stabnorm.functional import Kind, RawMoments, empty_moments, normalize_groups, raw_moments
from stabnorm.functional.moments import COV_XN, EPS_SHARE, MAX, MIN, REST_N, REST_X, SHIFT_N, SHIFT_X, VAR_N, VAR_X
from stabnorm.norms.rows import as_rows
from stabnorm.ops import use_kernels
from stabnorm.ops.accumulators import empty_accumulators, merge_accumulators
from stabnorm.ops.moments import accumulate_moments_
from tests.triton_kernels import DEVICE, MARKS, assert_close, nan_in_new_memory, random_rows

pytestmark = MARKS
__all__ = ["nan_in_new_memory"]


def truth(x: Tensor, kind: Kind, valid: Tensor | None, groups: int = 1) -> RawMoments:
    x, normalized, variances = x.double(), None, None
    rows = as_rows(x, 1 if kind == "group" else -1)
    if kind == "group":
        normalized, variances = normalize_groups(x, groups, 1e-5)
        normalized = as_rows(normalized, 1)
    return raw_moments(rows, kind, 1e-5, normalized=normalized, divided_by=variances, valid=valid)


def in_splits(*parts: tuple[Tensor, Tensor | None], kind: Kind, channel_dim: int = -1, groups: int = 1) -> RawMoments:
    """What the launch that ends a step makes of the accumulators that several forwards filled."""
    from stabnorm.ops.triton.accumulators import merge
    from stabnorm.ops.triton.shared import columns

    channels = parts[0][0].shape[channel_dim]
    accumulator = empty_moments(columns(channels, DEVICE).splits, channels, DEVICE)
    with use_kernels("triton"):
        for x, valid in parts:
            accumulate_moments_(x, valid, *accumulator, kind, channel_dim, 1, groups)
    return RawMoments(*(part[0] for part in merge(*(part[None] for part in accumulator))))


def assert_same(got: RawMoments, want: RawMoments, scale: float = 1.0, of_tokens: float = 1.0) -> None:
    assert got.seen == want.seen
    channel, expected = got.channel.double(), want.channel
    for shift, rest, natural in ((SHIFT_X, REST_X, scale), (SHIFT_N, REST_N, 1.0)):
        assert_close((channel[shift] + channel[rest]).float(), (expected[shift] + expected[rest]).float(), natural)
    for row, natural in ((VAR_X, scale**2), (COV_XN, scale), (VAR_N, 1.0)):
        assert_close(got.channel[row], expected[row], natural)
    assert torch.equal(got.channel[[MAX, MIN]].double(), expected[[MAX, MIN]])
    assert_close(got.token, want.token, of_tokens)


CASES: list[tuple[Kind, torch.dtype, float, bool]] = [
    ("layer", torch.float32, 0.0, True),
    ("rms", torch.float32, 0.0, False),
    ("batch", torch.float16, 0.0, True),
    ("layer", torch.bfloat16, 0.0, False),
    ("layer", torch.float32, 1e4, False),
    ("rms", torch.bfloat16, 10.0, True),
]


@pytest.mark.parametrize(("kind", "dtype", "offset", "masked"), CASES, ids=str)
def test_two_forwards_are_one_batch(kind: Kind, dtype: torch.dtype, offset: float, masked: bool) -> None:
    x = random_rows(83, 70, dtype, offset)
    valid = (torch.rand(83) < 0.6).to(DEVICE) if masked else None
    if valid is not None:
        valid[:5] = False
        x[~valid] = torch.tensor([torch.nan, torch.inf, -100, 100, torch.nan], dtype=dtype, device=DEVICE).repeat(14)
    parts = [(x[part], None if valid is None else valid[part]) for part in (slice(0, 50), slice(50, None))]
    got, want = in_splits(*parts, kind=kind), truth(x, kind, valid)
    # A token's mean of 1e4 is known to 1e-3 in float32, but here it is a value and a rest.
    assert_same(got, want, float(want.channel[VAR_X].amax().sqrt()), max(1.0, offset / 100))
    if offset == 1e4:
        assert_close(got.channel[VAR_X], want.channel[VAR_X], 0.0)
        mean = got.channel[SHIFT_X].double() + got.channel[REST_X]
        torch.testing.assert_close(mean, want.channel[SHIFT_X] + want.channel[REST_X], rtol=1e-10, atol=0)


def test_a_row_of_several_blocks_and_a_row_of_one_channel() -> None:
    for shape in ((3, 1100), (20, 1)):
        x = random_rows(*shape)
        assert_same(in_splits((x, None), kind="layer"), truth(x, "layer", None), 3.0)


def test_a_group_norm_brings_its_own() -> None:
    x = random_rows(3 * 12, 35).view(3, 12, 7, 5)
    x[0, 3] = 0.001  # a group of no variance
    got = in_splits((x, None), kind="group", channel_dim=1, groups=12)
    assert_same(got, truth(x, "group", None, groups=12), 3.0)
    assert got.token[EPS_SHARE] > 0


def test_a_plain_account_takes_it_too_and_a_batch_of_padding_adds_nothing() -> None:
    x, more = random_rows(30, 20), random_rows(9, 20)
    accumulator = empty_moments(1, 20, DEVICE)
    one = RawMoments(*(part[0] for part in accumulator))
    nothing = torch.zeros(30, dtype=torch.bool, device=DEVICE)
    with use_kernels("triton"):
        accumulate_moments_(x, None, *one, "layer", -1)
        before = [part.clone() for part in one]
        accumulate_moments_(x * torch.nan, nothing, *one, "layer", -1)
        assert all(map(torch.equal, one, before))
        accumulate_moments_(more, None, *one, "layer", -1)
    assert_same(one, truth(torch.cat([x, more]), "layer", None), 3.0)


def test_a_bad_number_shows_in_its_channel_only() -> None:
    x = random_rows(40, 6)
    x[7, 2], x[0, 4] = torch.nan, torch.inf
    channel = in_splits((x, None), kind="batch").channel
    for row in (MAX, VAR_X):
        assert torch.isfinite(channel[row]).tolist() == [True, True, False, True, False, True]
    assert channel[MAX, 2].isnan()
    assert channel[MIN, 2].isnan()


def test_the_splits_of_all_layers_merge_in_one_launch() -> None:
    from stabnorm.ops.triton.accumulators import merge

    layers, splits, channels = 3, 70, 21  # more splits than a tile takes
    parts = empty_moments(layers * splits, channels, DEVICE)
    parts.seen.copy_(torch.randint(0, 4, (layers * splits,)) * 100)
    parts.seen[: splits + 3] = 0  # the first layer did not run, nor the first splits of the second
    parts.channel.normal_()
    parts.channel[:, [VAR_X, VAR_N]] = parts.channel[:, [VAR_X, VAR_N]].abs() + 1
    parts.token.normal_()
    parts.channel[parts.seen == 0], parts.token[parts.seen == 0] = 0, empty_moments(1, 1, DEVICE).token[0]
    parts = RawMoments(*(part.unflatten(0, (layers, splits)) for part in parts))
    wide = functional.merge_splits(RawMoments(parts.seen, parts.channel.double(), parts.token.double()))
    got, again = merge(*parts), merge(*parts)
    assert all(map(torch.equal, got, again))
    assert got.seen[0] == 0
    for layer in range(layers):
        assert_same(RawMoments(*(p[layer] for p in got)), RawMoments(*(p[layer] for p in wide)), 4.0)


def test_a_monitor_whose_kernels_fill_splits_sees_what_the_formulas_see() -> None:
    histories = []
    for setting in ("triton", "reference"):
        torch.manual_seed(1)
        net = nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 12), nn.RMSNorm(12)).to(DEVICE)
        with use_kernels(setting), StabilityMonitor(net, flush_every=2) as monitor:
            for _ in range(2):
                for size in (15, 4):  # two forwards a step
                    net(torch.randn(size, 20).to(DEVICE)).backward(torch.randn(size, 12).to(DEVICE))
                monitor.step()
            histories.append(monitor.history())
    for name, values in histories[0].items():
        torch.testing.assert_close(values, histories[1][name], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_splits_filled_by_kernels_are_read_and_filled_without_them() -> None:
    x, more = random_rows(30, 20), random_rows(9, 20)
    with use_kernels("triton"):
        accumulators = empty_accumulators(1, 20, DEVICE)
        seen, channel, token = (part[0] for part in accumulators)
        accumulate_moments_(x, None, seen, channel, token, "layer", -1)
    with use_kernels("reference"):
        accumulate_moments_(more, None, seen, channel, token, "layer", -1)
        merged = merge_accumulators(accumulators)
    assert accumulators.seen.shape[1] > 1
    assert_same(RawMoments(*(part[0] for part in merged)), truth(torch.cat([x, more]), "layer", None), 3.0)
