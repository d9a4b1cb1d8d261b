"""The fast passes equal the formulas in float64: sizes around a block, offsets, dtypes; and a blend is exact."""

import pytest
import torch

from stabnorm import functional
from stabnorm.ops import use_kernels
from stabnorm.ops.aten import rows as aten_rows
from stabnorm.ops.blend import blend, join_gradients
from stabnorm.ops.rows import BatchMap, affine_of_rows, gradient_of_rows, moments_of_rows, sums_of_rows

CHANNELS = 384
BLOCK = aten_rows.BLOCK // CHANNELS
SIZES = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("center", [True, False])
def test_every_pass_equals_its_formula(rows: int, center: bool, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(rows, CHANNELS) + 2 * torch.randn(CHANNELS)).to(dtype)
    dy = torch.randn(rows, CHANNELS).to(dtype)
    scale, shift, slope, offset = torch.randn(4, CHANNELS).unbind()
    moments = moments_of_rows(x, None, center=center)
    want = functional.batch_moments(x.double(), None, center=center)
    assert moments.rows == rows
    torch.testing.assert_close(moments.square.double(), want.square, rtol=3e-6, atol=1e-6)
    mean = moments.mean
    if mean is not None and want.mean is not None:
        torch.testing.assert_close(mean.double(), want.mean, rtol=1e-6, atol=3e-6)
    tolerance = TOLERANCE[dtype]
    y = affine_of_rows(x, scale, shift)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() * scale + shift, rtol=tolerance, atol=10 * tolerance)
    deviations = x.double() if mean is None else x.double() - mean
    natural = rows**0.5 * 5
    for got, sums in zip(
        sums_of_rows(dy, x, mean, None), functional.upstream_sums(dy.double(), deviations, None), strict=True
    ):
        torch.testing.assert_close(got.double(), sums, rtol=0, atol=3e-6 * natural)
    dx = gradient_of_rows(dy, x, None, BatchMap(scale, slope, offset if center else None, mean))
    exact = functional.input_gradient(dy.double(), deviations, None, scale, slope, offset if center else None)
    assert dx.dtype == dtype
    torch.testing.assert_close(dx.double(), exact, rtol=tolerance, atol=10 * tolerance)


def test_a_mean_far_from_zero_costs_the_variance_nothing() -> None:
    x = torch.randn(5000, 64) + 1e4
    x[:4096, ::2] += 3  # blocks that differ
    moments = moments_of_rows(x, None, center=True)
    torch.testing.assert_close(moments.square.double(), x.double().var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("center", [True, False])
def test_rows_that_lie_apart_in_memory_are_measured_as_others(center: bool) -> None:
    wide = torch.randn(64, 300)
    for x in (wide.T, wide[:, :40], wide[::2, 3:20].T):
        dy = torch.randn(x.shape[1], len(x)).T
        with use_kernels("aten"):
            found = moments_of_rows(x, None, center=center)
            sums = sums_of_rows(dy, x, found.mean, None)
        expected = moments_of_rows(x.contiguous(), None, center=center)
        torch.testing.assert_close(found.square, expected.square)
        torch.testing.assert_close(sums, sums_of_rows(dy.contiguous(), x.contiguous(), expected.mean, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kernels", ["aten", "cpp", "reference"])
def test_a_blend_equals_its_formula_and_is_exact_at_its_ends(kernels: str, lam: float, dtype: torch.dtype) -> None:
    weight = torch.tensor(lam)
    norm, rep = torch.randn(2, 40, 8, dtype=dtype).unbind()
    norm[0], rep[0] = -0.0, -0.0
    if lam == 1:
        rep[3:6], rep[7], norm[8] = torch.nan, torch.inf, torch.inf
    if lam == 0:
        norm[3:6], norm[7] = torch.nan, torch.inf
    for fast, formula in ((blend, functional.blend), (join_gradients, functional.join_gradients)):
        with use_kernels(kernels):
            got = fast(weight, norm, rep)
        rounding = 2e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(got, formula(weight, norm, rep), rtol=rounding, atol=rounding)
        if lam == 1:
            assert torch.equal(got, norm)
            assert torch.equal(torch.signbit(got), torch.signbit(norm))
        if lam == 0:
            assert torch.equal(got, rep)
            assert torch.equal(torch.signbit(got), torch.signbit(rep))
