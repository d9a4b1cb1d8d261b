"""PowerNorm against its recursion written out."""

import pytest
import torch
from torch import nn

from stabnorm.errors import StabNormError
from stabnorm.nn import PowerNorm
from tests.nn_modules import run


def test_t13_forward_and_backward_follow_the_recursion_and_divide_by_the_same() -> None:
    norm = PowerNorm(8, warmup_steps=5, alpha_fwd=0.8, alpha_bkw=0.7)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    weight, bias = (p.detach().double() for p in norm.parameters())
    running, nu = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for step in range(40):
        x = (1 + torch.rand(8)) * torch.randn(4, 16, 8)
        dy = torch.randn(4, 16, 8) + 0.3 * x
        y, dx = run(norm, x, dy)
        x, dy = x.double(), dy.double()
        square = x.square().mean((0, 1))
        psi = ((running if step >= 5 else square) + 1e-5).sqrt()
        z, dz = x / psi, dy * weight
        gamma, inner = z.square().mean((0, 1)), (dz * z).mean((0, 1))
        torch.testing.assert_close(y.double(), z * weight + bias, rtol=1e-5, atol=1e-5)
        correction = nu if step >= 5 else inner  # exact while warming up
        torch.testing.assert_close(dx.double(), (dz - correction * z) / psi, rtol=1e-5, atol=1e-5)
        nu = nu * (1 - 0.3 * gamma) + 0.3 * inner
        running = running + (square - running) / (step + 1) if step < 5 else 0.8 * running + 0.2 * square
    torch.testing.assert_close(norm.running_square.double(), running, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.nu.double(), nu, rtol=1e-5, atol=1e-5)


def test_t13_the_gradient_is_bounded() -> None:
    norm = PowerNorm(8, warmup_steps=0)
    worst = 0.0
    for step in range(300):
        x = torch.randn(64, 8) * (30 if step % 20 == 19 else 1)
        dy = torch.nn.functional.normalize(torch.randn(64, 8), dim=0)
        psi, nu = (norm.running_square + norm.eps).sqrt(), norm.nu.clone()
        _, dx = run(norm, x, dy)
        bound = (1 + nu.abs() * (x / psi).norm(dim=0)) / psi
        assert (dx.norm(dim=0) <= bound * 1.0001).all()
        worst = max(worst, float(norm.nu.abs().max()))
    assert worst < 10


def test_its_warm_up_gradient_passes_gradcheck() -> None:
    norm = PowerNorm(4, groups=2).double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_have_the_gradient_of_the_plain_formula(dtype: torch.dtype) -> None:
    norm = PowerNorm(12, groups=3, warmup_steps=0)  # nu is 0 at first: only the groups bend the gradient
    norm.running_square.uniform_(0.5, 2)
    running = norm.running_square.double()
    x, dy = torch.randn(5, 7, 12).to(dtype), torch.randn(5, 7, 12).to(dtype)
    y, dx = run(norm, x, dy)
    wide = x.double().requires_grad_()
    grouped = wide.unflatten(-1, (3, 4))
    scaled = (grouped / (grouped.square().mean(-1, keepdim=True) + norm.eps).sqrt()).flatten(-2)
    want = scaled / (running + norm.eps).sqrt()
    (want_dx,) = torch.autograd.grad(want, wide, dy.double())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx.double(), want_dx, rtol=tolerance, atol=tolerance)


def test_with_groups_nan_in_the_padding_sends_no_gradient_back() -> None:
    norm, mask = PowerNorm(8, groups=2), torch.rand(4, 6) < 0.6
    x = torch.where(mask[..., None], torch.randn(4, 6, 8), torch.nan)
    _, dx = run(norm, x, torch.randn(4, 6, 8) * mask[..., None], mask)
    assert (dx[~mask] == 0).all()
    assert dx[mask].isfinite().all()


def test_t14_with_groups_it_refuses_to_fold_and_without_it_folds() -> None:
    for norm in (PowerNorm(8, groups=2), PowerNorm(8, variant="official")):
        with pytest.raises(StabNormError, match="divides every token by its own rms"):
            norm.fold_affine()
    PowerNorm(8).fold_affine()


def test_every_group_of_every_token_has_the_same_rms() -> None:
    norm = PowerNorm(8, groups=2, warmup_steps=0)  # divides by 1 at first
    y = norm(torch.randn(5, 8) * 10 ** torch.rand(5, 1))
    torch.testing.assert_close(y.unflatten(-1, (2, 4)).square().mean(-1), torch.ones(5, 2), rtol=1e-3, atol=1e-3)


def test_the_official_variant_is_the_published_module() -> None:
    from stabnorm.nn.official import OfficialPowerNorm

    norm, plain = PowerNorm(8, 2, 3, variant="official"), OfficialPowerNorm(8, 2, 3)
    for _ in range(6):
        x, dy = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
        for got, want in zip(run(norm, x, dy), run(plain, x, dy), strict=True):
            assert torch.equal(got, want)
