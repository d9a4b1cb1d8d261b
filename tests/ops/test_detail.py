"""The detail ops equal their formulas in float64, parts merge to the whole, and a recompute adds nothing."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stabnorm.functional import detail
from stabnorm.functional.detail import (
    DETAIL,
    KURTOSIS,
    MAX_TO_MEDIAN,
    MEDIAN,
    NONFINITE,
    OUTPUTS,
    REST,
    SEQUENCES,
    SHIFT,
    SQUARES,
    VAR,
    ZEROS,
    DetailMoments,
    detail_moments,
    empty_detail,
    merge_detail_,
    outlier_counts,
)
from stabnorm.norms.rows import as_rows
from stabnorm.ops.detail import accumulate_detail_, count_outliers_


def nothing(channels: int) -> DetailMoments:
    return DetailMoments(*(part[0] for part in empty_detail(1, channels)))


def accumulated(*parts: tuple[Tensor, Tensor | None], channel_dim: int = -1) -> DetailMoments:
    accumulator = nothing(parts[0][0].shape[channel_dim])
    for x, valid in parts:
        accumulate_detail_(x, valid, *accumulator, channel_dim)
    return accumulator


def truth(x: Tensor, valid: Tensor | None = None, channel_dim: int = -1) -> DetailMoments:
    keep = None if valid is None else valid.flatten()
    return detail_moments(as_rows(x.double(), channel_dim), x.shape[0], 1e-5, valid=keep)


def assert_same(got: DetailMoments, want: DetailMoments, scale: float = 1.0) -> None:
    assert torch.equal(got.seen, want.seen)
    assert got.counts.tolist() == want.counts.tolist()
    torch.testing.assert_close(got.means.double(), want.means.double(), rtol=2e-6, atol=1e-6)
    mean, expected = (m.sequences[SHIFT].double() + m.sequences[REST].double() for m in (got, want))
    torch.testing.assert_close(mean, expected, rtol=1e-7, atol=1e-6 * scale)
    torch.testing.assert_close(got.sequences[VAR].double(), want.sequences[VAR].double(), rtol=1e-5, atol=1e-6 * scale)


SHAPES = [(1, 1), (1, 7), (3, 1), (17, 5, 33), (2, 129, 64), (9001, 3), (40000, 40), (1, 300, 12)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64_for_odd_sizes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * (torch.rand(shape[-1]) + 0.5) + torch.randn(shape[-1])
    x = torch.where(torch.rand(shape) < 0.1, 0, x)
    assert_same(accumulated((x, None)), truth(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_path_that_a_gpu_takes_equals_float64_too(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * (torch.rand(shape[-1]) + 0.5) + torch.randn(shape[-1])
    assert_same(detail_moments(as_rows(x, -1), shape[0], 1e-5), truth(x))


def test_the_formulas_are_what_numpy_says() -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64) + 2
    got, rows = truth(x), x.flatten(0, 1)
    sizes = rows.abs()
    torch.testing.assert_close(got.means[MEDIAN], sizes.quantile(0.5, -1).mean())
    torch.testing.assert_close(got.means[MAX_TO_MEDIAN], (sizes.amax(-1) / sizes.quantile(0.5, -1)).mean())
    centred = rows - rows.mean(-1, keepdim=True)
    kurtosis = centred.pow(4).mean(-1) / centred.square().mean(-1).square()
    torch.testing.assert_close(got.means[KURTOSIS], kurtosis.mean())
    means = x.mean(1)
    torch.testing.assert_close(got.sequences[VAR], means.var(0, correction=0))
    assert got.counts.tolist() == [0, 0, 3, 75, 0]


def test_keeps_its_digits_at_mean_1e4() -> None:
    x = torch.randn(6, 100, 48) + 1e4
    got, want = accumulated((x[:2], None), (x[2:], None)), truth(x)
    torch.testing.assert_close(got.means.double(), want.means, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.sequences[VAR].double(), want.sequences[VAR], rtol=1e-5, atol=0)


def test_padding_of_garbage_counts_for_nothing() -> None:
    x, valid = torch.randn(5, 21, 16), torch.rand(5, 21) < 0.6
    valid[3] = False  # a sequence of nothing
    spoilt = torch.where(valid[..., None], x, torch.tensor([torch.nan, torch.inf, 1e30, 0.0]).repeat(4))
    want = truth(torch.where(valid[..., None], x, 1.0), valid)
    assert want.counts[SEQUENCES] == 4
    assert want.counts[SQUARES] == valid.sum(1).square().sum()
    assert_same(accumulated((spoilt, valid)), want)
    assert_same(detail_moments(spoilt.flatten(0, 1), 5, 1e-5, valid=valid.flatten()), want)


def test_a_batch_with_no_valid_token_adds_nothing() -> None:
    x, none = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool)
    before = accumulated((x, None))
    after = accumulated((x, None), (x, none), (x[:0], None))
    merge_detail_(after, detail_moments(torch.randn(6, 8), 2, 1e-5, valid=none.flatten()))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_every_field_says_how_it_merges_and_every_row_has_its_name() -> None:
    assert tuple(DETAIL.fields) == DetailMoments._fields
    for field in DETAIL.fields.values():
        assert [getattr(detail, name) for name in field.names] == list(range(len(field.names)))


def test_merging_parts_with_different_means_is_one_big_batch() -> None:
    lengths, offsets = (7, 40, 1, 13), (3.0, -3.0, 50.0, 0.0)
    parts = [torch.randn(4, n, 20) * 0.5 + offset for n, offset in zip(lengths, offsets, strict=True)]
    longest = max(lengths)
    padded = [torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]
    masks = [torch.arange(longest).expand(4, -1) < n for n in lengths]
    want = truth(torch.cat(padded), torch.cat(masks))
    for order in itertools.permutations(range(4), 4):
        assert_same(accumulated(*((parts[i], None) for i in order)), want, scale=10.0)


def test_all_layers_of_several_ranks_merge_at_once() -> None:
    parts = [[torch.randn(3, n, 5) + rank for n in (4, 9)] for rank in range(2)]
    ranks = []
    for of_rank in parts:
        slab = empty_detail(2, 5)
        for layer, x in enumerate(of_rank):
            accumulate_detail_(x, None, *DetailMoments(*(part[layer] for part in slab)), -1)
        ranks.append(slab)
    stacked = DetailMoments(*map(torch.stack, zip(*ranks, strict=True)))  # as one collective brings them
    first, second = (DetailMoments(*(part[rank : rank + 1] for part in stacked)) for rank in range(2))
    merge_detail_(first, second)
    merge_detail_(*ranks)
    assert all(torch.equal(a[0], b) for a, b in zip(first, ranks[0], strict=True))
    for layer in range(2):
        whole = truth(torch.cat([of_rank[layer] for of_rank in parts]))
        assert_same(DetailMoments(*(part[layer] for part in ranks[0])), whole)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("plain", [True, False])
def test_non_finite_elements_are_counted_and_do_not_pass_for_a_median(bad: float, plain: bool) -> None:
    x = torch.randn(4, 10, 8)
    x[1, 2, :5], x[3, 0, 0] = bad, 0
    got = detail_moments(x.flatten(0, 1), 4, 1e-5) if plain else accumulated((x, None))
    assert got.counts[[NONFINITE, ZEROS]].tolist() == [5, 1]
    assert not bool(got.means[MEDIAN].isfinite())
    assert not bool(got.means[MAX_TO_MEDIAN].isfinite())


def test_tokens_of_zeros_and_of_huge_numbers_have_a_shape() -> None:
    x = torch.randn(4, 8)
    x[0], x[1], x[2, 0] = 0, x[1] * 1e12, 1e18
    for got in (accumulated((x, None)), detail_moments(x, 4, 1e-5)):
        assert bool(got.means.isfinite().all())
        assert got.means[KURTOSIS] < 8


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float16, 16.0), (torch.bfloat16, 128.0), (torch.float32, 128.0), (torch.float64, 1024.0)]
)
def test_the_range_is_that_of_the_narrowest_dtype_met(dtype: torch.dtype, bits: float) -> None:
    x = torch.randn(4, 8)
    accumulator = accumulated((x.to(dtype), None))
    assert abs(float(accumulator.range_bits) - bits) < 0.01
    accumulate_detail_(x.half(), None, *accumulator, -1)
    assert abs(float(accumulator.range_bits) - 16) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_outliers_of_an_output_are_counted_per_channel(dtype: torch.dtype, channel_dim: int) -> None:
    y = 4 * torch.randn(3, 6, 5).to(dtype)
    y[0, 0, 0] = 6
    channels, valid = y.shape[channel_dim], torch.rand([n for i, n in enumerate(y.shape) if i != channel_dim % 3]) < 0.7
    accumulator = nothing(channels)
    count_outliers_(y, None, accumulator.counts, accumulator.outputs, channel_dim)
    count_outliers_(y, valid, accumulator.counts, accumulator.outputs, channel_dim)
    rows = as_rows(y, channel_dim)
    outlying = rows.abs() >= 6
    assert accumulator.outputs.tolist() == (outlying.sum(0) + outlying[valid.flatten()].sum(0)).tolist()
    assert accumulator.counts[OUTPUTS] == len(rows) + valid.sum()
    tokens, plain = outlier_counts(rows, valid.flatten())
    assert (int(tokens), plain.tolist()) == (int(valid.sum()), outlying[valid.flatten()].sum(0).tolist())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recompute_adds_nothing(reentrant: bool) -> None:
    accumulator = nothing(8)

    def block(x: Tensor) -> Tensor:
        with torch.no_grad():
            accumulate_detail_(x, None, *accumulator, -1)
            count_outliers_(x, None, accumulator.counts, accumulator.outputs, -1)
        return torch.tanh(x) * x

    x = torch.randn(10, 8, requires_grad=True)
    checkpoint(block, x, use_reentrant=reentrant).backward(torch.randn(10, 8))
    assert int(accumulator.seen) == int(accumulator.counts[OUTPUTS]) == 10


def test_the_registered_ops_are_what_is_called_directly_and_tell_the_truth_about_themselves() -> None:
    x, accumulator = 3 * torch.randn(4, 9, 8), nothing(8)
    direct = accumulated((x, None))
    count_outliers_(x, None, direct.counts, direct.outputs, -1)
    args = (x, None, *accumulator, -1, 1, 1e-5, True, True, True)
    outlier_args = (x, None, accumulator.counts, accumulator.outputs, -1, 1)
    torch.ops.stabnorm.accumulate_detail_(*args)
    torch.ops.stabnorm.count_outliers_(*outlier_args)
    for a, b in zip(direct, accumulator, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for op, given in (("accumulate_detail_", args), ("count_outliers_", outlier_args)):
        overload = getattr(torch.ops.stabnorm, op).default
        torch.library.opcheck(overload, given, test_utils=("test_schema", "test_faketensor"))
