"""The kernels of `ops.blended`, `ops.blend` and GroupScaling equal the formulas in float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stabnorm import functional
from stabnorm.nn import PRepBN
from stabnorm.ops import use_kernels
from stabnorm.ops.blend import blend, join_gradients
from stabnorm.ops.blended import blended_norm
from stabnorm.ops.groups import gradient_of_groups, scaled_groups
from stabnorm.ops.selftest import Case, checks_of, truth
from tests.triton_kernels import DEVICE, DTYPES, MARKS, assert_close, nan_in_new_memory, random_rows

pytestmark = MARKS
__all__ = ["nan_in_new_memory"]


@pytest.mark.parametrize("lam", [0, 1, 2], ids=["lam 0", "lam 0.3", "lam 1"])
@pytest.mark.parametrize(
    ("shape", "dtype", "masked"),
    [((37, 150), torch.float32, True), ((20, 33), torch.bfloat16, False), ((3, 1), torch.float16, True)],
    ids=str,
)
def test_both_norms_of_a_prepbn_there_and_back(
    shape: tuple[int, int], dtype: torch.dtype, masked: bool, lam: int
) -> None:
    x, dy = random_rows(*shape, dtype), random_rows(*shape, dtype)
    valid = (torch.rand(shape[0]) < 0.7).to(DEVICE) if masked else None
    if valid is not None:
        valid[0], valid[-1] = True, False
        x[~valid], dy[~valid] = torch.nan, 0
    case = Case("", x, dy, valid, torch.randn(6, shape[1]).to(DEVICE))
    check = checks_of(blended_norm)[lam]
    wanted = truth(check, case)
    with use_kernels("triton"):
        results = check(case)
    for name, (got, _, of_rows) in results.items():
        want, natural, _ = wanted[name]
        tolerance = got if of_rows else got.float()
        assert_close(tolerance.to(dtype if of_rows else torch.float32), want, natural, of_rows=of_rows)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_a_module_trains_as_with_the_formulas(lam: float) -> None:
    x, dy = random_rows(40, 24), random_rows(40, 24)
    outcomes = []
    for setting, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(1)
        norm = PRepBN(24).to(DEVICE)
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        norm.to(dtype).lam.fill_(lam)
        with use_kernels(setting):
            given = x.to(dtype).requires_grad_()
            y = norm(given)
            gradients = torch.autograd.grad(y, [given, *norm.parameters()], dy.to(dtype))
        outcomes.append([y.detach(), *gradients, norm.rep.running_var])
    for got, want in zip(*outcomes, strict=True):
        assert_close(got, want, want.abs().amax() + 1)
        assert (want == 0).all() == (got == 0).all()  # what has no part has no gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blends_are_exact_at_their_ends(dtype: torch.dtype) -> None:
    a, b = random_rows(40, 8, dtype), random_rows(40, 8, dtype)
    a[0], b[0], a[1], b[2] = -0.0, -0.0, torch.inf, torch.nan
    pairs: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = [
        (blend, functional.blend),
        (join_gradients, functional.join_gradients),
    ]
    for lam, (fast, formula) in itertools.product((0.0, 0.3, 1.0), pairs):
        weight = torch.tensor(lam, device=DEVICE)
        with use_kernels("triton"):
            got = fast(weight, a, b)
        if lam in (0.0, 1.0):
            want = a if lam == 1 else b
            assert torch.equal(got.nan_to_num(0.5), want.nan_to_num(0.5))
            assert torch.equal(torch.signbit(got), torch.signbit(want))
        else:
            assert_close(got[3:], formula(weight.double(), a[3:].double(), b[3:].double()), 5.0, of_rows=True)


@pytest.mark.parametrize("groups", [1, 3, 48])
def test_group_scaling_there_and_back(groups: int) -> None:
    x, dy = random_rows(50, 48), random_rows(50, 48)
    padding = torch.rand(50).to(DEVICE) < 0.3
    x[padding], dy[padding] = torch.nan, 0
    with use_kernels("triton"):
        y, r = scaled_groups(x, groups, 1e-5)
        dx = gradient_of_groups(dy, y, r, True)
    exact = x.double().requires_grad_()
    want = functional.scale_groups(exact, groups, 1e-5)
    (gradient,) = torch.autograd.grad(want, exact, dy.double())
    assert_close(y[~padding], want[~padding], 1.0)
    assert_close(dx[~padding], gradient[~padding], r[~padding].amax() * 10)
    assert not dx[padding].any()
