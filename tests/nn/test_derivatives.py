"""Gradients at padding; second derivatives and torch.func: exact in eval, refused in training, where they are wrong."""

import copy

import pytest
import torch
from torch import Tensor, nn

from stabnorm.errors import StabNormError
from stabnorm.nn import PowerNorm, PRepBN, UnifiedNorm
from stabnorm.nn._progressive import ProgressiveNorm
from tests.nn_modules import MODULES, built, run, state

every = pytest.mark.parametrize("name", list(MODULES))


@every
def test_what_comes_back_to_padding_stays_there(name: str) -> None:
    norm = built(name)
    twin = copy.deepcopy(norm)
    for _ in range(8):
        x, dy = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
        mask = torch.rand(4, 6) > 0.3
        silent = torch.where(mask[..., None], dy, 0)
        _, dx = run(norm, x, dy, mask)
        _, dx_silent = run(twin, x, silent, mask)
        torch.testing.assert_close(dx[mask], dx_silent[mask])
        assert dx[~mask].abs().sum() > 0
        assert torch.equal(dx_silent[~mask], torch.zeros_like(dx_silent[~mask]))
    theirs = state(twin)
    for key, value in state(norm).items():
        torch.testing.assert_close(value, theirs[key], msg=key)


def refuses_a_gradient_of_the_gradient(norm: nn.Module) -> None:
    for _ in range(6):
        run(norm, torch.randn(4, 6, 8), torch.randn(4, 6, 8))
    x = torch.randn(4, 6, 8, requires_grad=True)
    y = norm(x)
    before = state(norm)
    with pytest.raises(StabNormError, match="no second derivative in training mode"):
        torch.autograd.grad(y, x, torch.randn(4, 6, 8), create_graph=True)
    for key, value in state(norm).items():
        assert torch.equal(value, before[key]), key
        assert not norm.get_buffer(key).requires_grad, key


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("taper")])  # see test_taper.py
def test_in_training_it_is_refused_and_no_state_is_lost(name: str) -> None:
    refuses_a_gradient_of_the_gradient(built(name))


def test_the_published_modules_refuse_it_too() -> None:
    refuses_a_gradient_of_the_gradient(UnifiedNorm(8, filtration=None, variant="official"))
    refuses_a_gradient_of_the_gradient(PowerNorm(8, variant="official"))


def test_it_is_refused_where_the_layer_norm_is_all_there_is() -> None:
    norm = PRepBN(8)
    assert norm.lam == 1
    refuses_a_gradient_of_the_gradient(norm)


@every
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_in_eval_it_is_exact(name: str, lam: float) -> None:
    norm = built(name).double()
    if isinstance(norm, ProgressiveNorm):
        norm.lam.fill_(lam)
    elif lam:
        return
    norm(torch.randn(3, 5, 8, dtype=torch.float64))
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(norm.eval(), x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap's own
@every
def test_in_eval_it_goes_through_torch_func(name: str) -> None:
    norm = built(name)
    for _ in range(6):
        run(norm, torch.randn(4, 6, 8), torch.randn(4, 6, 8))
    norm.eval()
    x, dy = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    (want,) = torch.autograd.grad(norm(x), x, dy)

    def projected(x: Tensor, dy: Tensor) -> Tensor:
        y: Tensor = norm(x)
        return (y * dy).sum()

    torch.testing.assert_close(torch.func.grad(projected)(x.detach(), dy), want)
    torch.testing.assert_close(torch.func.vmap(norm)(x), norm(x))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(projected))(x.detach(), dy), want)
