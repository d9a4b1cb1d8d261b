"""The op equals `functional.raw_moments` in float64: sizes, masks, offsets, layouts; and a recompute adds nothing."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stabnorm.functional import Kind, RawMoments, empty_moments, merge_moments_, normalize_groups, raw_moments
from stabnorm.functional.moments import COV_XN, EPS_SHARE, MAX, MIN, REST_N, REST_X, SHIFT_N, SHIFT_X, VAR_N, VAR_X
from stabnorm.norms.rows import as_rows, from_rows
from stabnorm.ops.moments import accumulate_moments_

KINDS: tuple[Kind, ...] = ("layer", "rms", "batch")


def accumulated(*parts: tuple[Tensor, Tensor | None], kind: Kind, channel_dim: int = -1, groups: int = 1) -> RawMoments:
    accumulator = empty_moments(1, parts[0][0].shape[channel_dim])
    one = RawMoments(accumulator.seen[0], accumulator.channel[0], accumulator.token[0])
    for x, valid in parts:
        accumulate_moments_(x, valid, *one, kind, channel_dim, 1, groups)
    return one


def truth(x: Tensor, kind: Kind, valid: Tensor | None = None, channel_dim: int = -1, groups: int = 1) -> RawMoments:
    x = x.double()
    rows, normalized, variances = as_rows(x, channel_dim), None, None
    if kind in ("group", "instance"):
        normalized, variances = normalize_groups(x, groups, 1e-5)
        normalized = as_rows(normalized, channel_dim)
    keep = None if valid is None else valid.flatten()
    return raw_moments(rows, kind, 1e-5, normalized=normalized, divided_by=variances, valid=keep)


def assert_same(got: RawMoments, want: RawMoments, scale: float = 1.0) -> None:
    assert got.seen == want.seen
    channel, expected = got.channel.double(), want.channel
    for shift, rest in ((SHIFT_X, REST_X), (SHIFT_N, REST_N)):
        torch.testing.assert_close(
            channel[shift] + channel[rest], expected[shift] + expected[rest], rtol=1e-6, atol=2e-6 * scale
        )
    for row, natural in ((VAR_X, scale**2), (COV_XN, scale), (VAR_N, 1.0)):
        torch.testing.assert_close(channel[row], expected[row], rtol=1e-5, atol=5e-6 * natural)
    for row in (MAX, MIN):
        torch.testing.assert_close(channel[row], expected[row], rtol=1e-6, atol=0)
    torch.testing.assert_close(got.token.double(), want.token, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (17, 5, 33), (2, 129, 64), (9001, 3), (40000, 40)])
def test_equals_float64_for_odd_sizes(kind: Kind, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * (torch.rand(shape[-1]) + 0.5) + torch.randn(shape[-1])
    assert_same(accumulated((x, None), kind=kind), truth(x, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (17, 5, 33), (9001, 3)])
def test_the_plain_path_that_a_gpu_takes_equals_float64_too(kind: Kind, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * (torch.rand(shape[-1]) + 0.5) + torch.randn(shape[-1])
    assert_same(raw_moments(as_rows(x, -1), kind, 1e-5), truth(x, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_its_digits_at_mean_1e4(kind: Kind) -> None:
    x = torch.randn(6, 100, 48) + 1e4
    got, want = accumulated((x[:2], None), (x[2:], None), kind=kind), truth(x, kind)
    torch.testing.assert_close(got.channel[VAR_X].double(), want.channel[VAR_X], rtol=2e-6, atol=0)
    mean = got.channel[SHIFT_X].double() + got.channel[REST_X]
    torch.testing.assert_close(mean, want.channel[SHIFT_X] + want.channel[REST_X], rtol=1e-11, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_of_1000_does_not_spoil_the_variance_of_the_rest(kind: Kind) -> None:
    x = torch.randn(4, 64, 24)
    x[:, 0] *= 1000
    assert_same(accumulated((x, None), kind=kind), truth(x, kind), scale=250.0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_garbage_counts_for_nothing(kind: Kind) -> None:
    x, valid = torch.randn(5, 21, 16), torch.rand(5, 21) < 0.6
    spoilt = torch.where(valid[..., None], x, torch.tensor([torch.nan, torch.inf, 1e30, -torch.inf]).repeat(4))
    want = truth(x[valid], kind)
    assert_same(accumulated((spoilt, valid), kind=kind), want)
    assert_same(raw_moments(spoilt.flatten(0, 1).double(), kind, 1e-5, valid=valid.flatten()), want)


def test_a_batch_with_no_valid_token_adds_nothing() -> None:
    x, none = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool)
    before = accumulated((x, None), kind="layer")
    after = accumulated((x, None), (x, none), (x[:0], None), kind="layer")
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    new = raw_moments(torch.randn(6, 8), "layer", 1e-5, valid=none.flatten())
    merge_moments_(after, new)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_parts_with_different_means_is_one_big_batch(kind: Kind) -> None:
    parts = [torch.randn(n, 20) * 0.5 + offset for n, offset in ((7, 3.0), (90, -3.0), (1, 50.0), (33, 0.0))]
    whole = torch.cat(parts)
    want = truth(whole, kind)
    for order in itertools.permutations(range(4), 4):
        assert_same(accumulated(*((parts[i], None) for i in order), kind=kind), want, scale=10.0)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_whose_means_lie_far_apart_keep_their_digits_in_one_batch_and_in_two(kind: Kind) -> None:
    x = torch.randn(40, 100, 20) + 100 * torch.randn(40, 1, 20)
    assert_same(accumulated((x, None), kind=kind), truth(x, kind), scale=100.0)
    assert_same(accumulated((x[:3], None), (x[3:], None), kind=kind), truth(x, kind), scale=100.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoilt", [0, 1], ids=["the first", "the second"])
def test_a_nan_in_one_of_two_micro_batches_spoils_the_whole_of_its_channel(kind: Kind, spoilt: int) -> None:
    parts = [torch.randn(9, 5), torch.randn(30, 5)]
    parts[spoilt][4, 2] = torch.nan
    got = accumulated(*((part, None) for part in parts), kind=kind)
    want = accumulated((torch.cat(parts), None), kind=kind)
    assert got.seen == want.seen == 39
    assert got.channel[[REST_X, VAR_X, MAX, MIN], 2].isnan().all()
    rows = [VAR_X, MAX, MIN]
    torch.testing.assert_close(got.channel[rows], want.channel[rows], rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(got.token, want.token, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("kind", "groups"), [("group", 4), ("group", 1), ("instance", 12)])
def test_group_and_instance_norm(kind: Kind, groups: int) -> None:
    x = torch.randn(3, 12, 7, 5) + 2
    x[0, 3] = 0.001  # a group of no variance
    got = accumulated((x, None), kind=kind, channel_dim=1, groups=groups)
    assert_same(got, truth(x, kind, channel_dim=1, groups=groups), scale=3.0)
    assert (got.token[EPS_SHARE] > 0) == (groups == 12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_input_shows_in_its_channel_only(bad: float) -> None:
    x = torch.randn(30, 8)
    x[4, 2] = bad
    got = accumulated((x, None), kind="batch")
    finite = torch.isfinite(got.channel[MAX]) & torch.isfinite(got.channel[VAR_X])
    assert finite.tolist() == [True, True, False, True, True, True, True, True]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recompute_adds_nothing(reentrant: bool) -> None:
    accumulator = empty_moments(1, 8)
    one = RawMoments(accumulator.seen[0], accumulator.channel[0], accumulator.token[0])

    def block(x: Tensor) -> Tensor:
        with torch.no_grad():
            accumulate_moments_(x, None, *one, "layer", -1)
        return torch.tanh(x) * x

    x = torch.randn(10, 8, requires_grad=True)
    checkpoint(block, x, use_reentrant=reentrant).backward(torch.randn(10, 8))
    assert int(one.seen) == 10


def test_the_registered_op_is_what_is_called_directly() -> None:
    x = torch.randn(4, 9, 8)
    direct, accumulator = accumulated((x, None), kind="layer"), empty_moments(1, 8)
    op = torch.ops.stabnorm.accumulate_moments_
    op(
        x,
        None,
        accumulator.seen[0],
        accumulator.channel[0],
        accumulator.token[0],
        "layer",
        -1,
        1,
        1,
        1e-5,
        True,
        True,
        False,
    )
    for a, b in zip(direct, accumulator, strict=True):
        torch.testing.assert_close(a, b[0], rtol=0, atol=1e-6)


def test_the_registered_op_tells_the_truth_about_itself() -> None:
    accumulator = empty_moments(1, 8)
    args = (
        torch.randn(4, 8),
        None,
        accumulator.seen[0],
        accumulator.channel[0],
        accumulator.token[0],
        "layer",
        -1,
        1,
        1,
        1e-5,
    )
    torch.library.opcheck(
        torch.ops.stabnorm.accumulate_moments_.default,
        (*args, True, True, False),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(("channel_dim", "feature_dims"), [(-1, 1), (3, 1), (1, 1), (-3, 1), (-1, 2)], ids=str)
def test_rows_go_back_to_what_they_were_made_of(channel_dim: int, feature_dims: int) -> None:
    for x in (torch.randn(2, 3, 4, 5), torch.randn(5, 4, 3, 2).permute(3, 2, 1, 0)):
        assert torch.equal(from_rows(as_rows(x, channel_dim, feature_dims), x.shape, channel_dim, feature_dims), x)
