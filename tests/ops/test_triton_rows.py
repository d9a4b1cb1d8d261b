"""The kernels of `ops.rows` equal the formulas in float64; see tests/triton_kernels.py for how they run."""

import pytest
import torch
from torch import Tensor

from stabnorm import functional
from stabnorm.ops import use_kernels
from stabnorm.ops.rows import BatchMap, affine_of_rows, gradient_of_rows, moments_of_rows, sums_of_rows
from tests.triton_kernels import DEVICE, DTYPES, MARKS, assert_close, nan_in_new_memory, random_rows

pytestmark = MARKS
__all__ = ["nan_in_new_memory"]

# One row, one channel, several blocks of channels, a ragged last tile, rows of which a last lane gets none.
SHAPES = [(1, 1), (3, 70), (131, 37), (70, 150)]
CASES = [
    (shape, dtype, masked)
    for shape, dtype, masked in zip(
        SHAPES * 2, [*DTYPES, *DTYPES, *DTYPES], [True, False, True, False, False, True, False, True], strict=False
    )
]


def mask_of(rows: int) -> Tensor:
    valid = torch.rand(rows) < 0.7
    valid[: min(4, rows - 1)] = False  # the first lanes start with padding
    valid[-1] = True
    return valid.to(DEVICE)


def with_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else torch.where(valid[:, None], x, torch.nan)


@pytest.mark.parametrize(("shape", "dtype", "masked"), CASES, ids=str)
def test_moments_and_sums(shape: tuple[int, int], dtype: torch.dtype, masked: bool) -> None:
    valid = mask_of(shape[0]) if masked else None
    x, dy = with_padding(random_rows(*shape, dtype), valid), random_rows(*shape, dtype)
    dy = dy if valid is None else dy * valid[:, None]
    with use_kernels("triton"):
        moments = [moments_of_rows(x, valid, center=center) for center in (True, False)]
        mean = moments[0].mean
        of_kernel = [sums_of_rows(dy, x, m, valid) for m in (mean, None)]
    for got, center in zip(moments, (True, False), strict=True):
        want = functional.batch_moments(x.double(), valid, center=center)
        assert got.rows == want.rows
        assert_close(got.square, want.square, want.square.amax())
        if want.mean is not None:
            assert got.mean is not None
            assert_close(got.mean, want.mean)
    assert mean is not None
    for sums, deviations in zip(of_kernel, (x.double() - mean, x.double()), strict=True):
        size = (dy * deviations.nan_to_num(0)).square().sum(0).sqrt() + dy.double().square().sum(0).sqrt()
        for got_sum, want_sum in zip(sums, functional.upstream_sums(dy.double(), deviations, valid), strict=True):
            assert_close(got_sum, want_sum, size)


@pytest.mark.parametrize(("shape", "dtype", "masked"), CASES, ids=str)
def test_the_maps(shape: tuple[int, int], dtype: torch.dtype, masked: bool) -> None:
    valid = mask_of(shape[0]) if masked else None
    x, dy = random_rows(*shape, dtype), random_rows(*shape, dtype)
    mean, scale, shift, slope, offset = torch.randn(5, shape[1]).to(DEVICE).unbind()
    with use_kernels("triton"):
        for added in (shift, None):
            y = affine_of_rows(x, scale, added)
            assert y.dtype == dtype
            want = x.double() * scale if added is None else x.double() * scale + added
            assert_close(y, want, (x.double() * scale).abs() + shift.abs(), of_rows=True)
        for m, o in ((mean, offset), (None, None)):
            dx = gradient_of_rows(with_padding(dy, valid), x, valid, BatchMap(scale, slope, o, m))
            deviations = x.double() if m is None else x.double() - m
            want = functional.input_gradient(dy.double(), deviations, valid, scale, slope, o)
            keep = slice(None) if valid is None else valid
            natural = (deviations * slope).abs() + (dy.double() * scale).abs() + offset.abs() + (mean * slope).abs()
            assert_close(dx[keep], want[keep], natural[keep], of_rows=True)


def test_a_mean_of_1e4_costs_the_variance_nothing() -> None:
    x = random_rows(200, 20, offset=1e4)
    with use_kernels("triton"):
        moments = moments_of_rows(x, None, center=True)
    assert_close(moments.square, x.double().var(0, correction=0), 0.0)
    assert moments.mean is not None
    torch.testing.assert_close(moments.mean.double(), x.double().mean(0), rtol=1e-7, atol=0)


def test_no_valid_row_gives_zeros_and_a_bad_number_stays_in_its_channel() -> None:
    x = random_rows(40, 6)
    x[7, 2], x[0, 4] = torch.nan, torch.inf
    with use_kernels("triton"):
        nothing = moments_of_rows(x, torch.zeros(40, dtype=torch.bool, device=DEVICE), center=True)
        squares = [moments_of_rows(x, None, center=center).square for center in (True, False)]
    assert nothing.rows == 0
    assert nothing.mean is not None
    assert not nothing.mean.any()
    assert not nothing.square.any()
    for square in squares:
        assert torch.isfinite(square).tolist() == [True, True, False, True, False, True]


def test_rows_that_do_not_follow_each_other_and_channels_that_do_not() -> None:
    wide = random_rows(50, 24)
    for x in (wide[::2, 3:20], wide.T[:20, ::3]):
        dy = torch.randn_like(x)
        with use_kernels("triton"):
            assert_close(moments_of_rows(x, None, center=False).square, x.double().square().mean(0))
            assert_close(affine_of_rows(x, x[0], x[1]), x.double() * x[0] + x[1], x.abs().max(), of_rows=True)
            product = (dy.double() * x.double()).sum(0)
            assert_close(sums_of_rows(dy, x, None, None)[1], product, product.abs().max())


def test_the_same_bits_every_time_and_two_tensors_are_not_one() -> None:
    x, dy = random_rows(130, 70), random_rows(130, 70)
    with use_kernels("triton"):
        once, again = (torch.stack(sums_of_rows(dy, x, x[0], None)) for _ in range(2))
        other = torch.stack(sums_of_rows(x, x, x[0], None))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_the_kernels_are_what_runs() -> None:
    with use_kernels("triton"):
        for op in (moments_of_rows, affine_of_rows, sums_of_rows, gradient_of_rows):
            assert op.chosen(random_rows(2, 2)) == "triton"
