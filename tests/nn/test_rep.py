"""RepBN: the lemma, torch's BatchNorm, gradients, plain averages."""

import pytest
import torch
from torch import Tensor, nn

from stabnorm.functional import channel_affine
from stabnorm.nn import RepBN
from tests.nn_modules import run, state


def test_t8_the_lemma_holds_with_a_channel_of_variance_1e_8() -> None:
    norm = RepBN(6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    spread = torch.tensor([1e-4, 1.0, 3.0, 0.1, 1e-2, 10.0])
    for _ in range(200):
        norm(torch.randn(64, 6) * spread + torch.tensor([0.5, -2.0, 3.0, 0.0, 1.0, -5.0]))
    norm.double().eval()
    assert norm.running_mean is not None
    assert 0.3e-8 < norm.running_var[0] < 3e-8
    x = torch.randn(32, 6, dtype=torch.float64) * spread
    mu, sigma = norm.running_mean, (norm.running_var + norm.eps).sqrt()
    weight, bias, eta = norm.weight, norm.bias, norm.eta
    assert bias is not None
    # BN(X; mu, sigma, gamma, beta) + eta X = BN(X; mu, sigma, gamma + eta sigma, beta + eta mu)
    lemma = (x - mu) / sigma * (weight + eta * sigma) + bias + eta * mu
    torch.testing.assert_close(norm(x), lemma, rtol=1e-6, atol=1e-6)
    scale, shift, _ = norm.fold_affine()
    torch.testing.assert_close(x * scale + shift, lemma, rtol=1e-6, atol=1e-6)
    without_eps = weight / norm.running_var.sqrt() + eta
    assert (without_eps - channel_affine(weight, bias, eta, mu, 1 / sigma)[0]).abs()[0] > 1  # sqrt(var) will not do


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_without_the_skip_path_it_is_batch_norm(offset: float) -> None:
    norm, plain = RepBN(8), nn.BatchNorm1d(8)
    nn.init.zeros_(norm.eta)
    for _ in range(5):
        x, dy = torch.randn(32, 8) + offset, torch.randn(32, 8)
        for got, want in zip(run(norm, x, dy), run(plain, x, dy), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3 if offset else 1e-5)
    assert norm.running_mean is not None
    assert plain.running_mean is not None
    assert plain.running_var is not None
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_its_gradients_pass_gradcheck(center: bool, masked: bool) -> None:
    norm = RepBN(5, center=center).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    names = [name for name, _ in norm.named_parameters()]
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4) > 0.3 if masked else None

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), (x, mask))
        return y if mask is None else y[mask]

    assert torch.autograd.gradcheck(function, (x, *norm.parameters()))


def test_scale_only_has_no_bias_and_folds_to_no_shift() -> None:
    norm = RepBN(8, center=False)
    assert [name for name, _ in norm.named_parameters()] == ["weight", "eta"]
    norm(torch.randn(64, 8) + 3)
    _, shift, _ = norm.eval().fold_affine()
    assert torch.equal(shift, torch.zeros(8, dtype=torch.float64))


def test_language_starts_silent() -> None:
    x = torch.randn(4, 8)
    assert torch.equal(RepBN(8, init="language")(x), torch.zeros(4, 8))


def test_no_momentum_is_a_plain_average() -> None:
    norm = RepBN(8, momentum=None)
    batches = [torch.randn(16, 8) * (i + 1) for i in range(5)]
    for x in batches:
        norm(x)
    norm(torch.full((16, 8), torch.nan))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in batches]).mean(0))
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))


def test_the_filter_keeps_shifted_means_out_until_they_stay() -> None:
    norm = RepBN(16, filtration="calibrated")
    for _ in range(60):
        norm(torch.randn(256, 16))
    before = state(norm)
    norm(torch.randn(256, 16) + 5)
    assert norm.skips == 1
    for name in ("running_mean", "running_var", "window"):
        assert torch.equal(state(norm)[name], before[name])
    for _ in range(60):
        norm(torch.randn(256, 16) + 5)
    torch.testing.assert_close(norm.running_mean, torch.full((16,), 5.0), rtol=0.05, atol=0)


@pytest.mark.parametrize("filtration", [None, "calibrated"])
def test_one_row_has_no_variance_to_learn(filtration: str | None) -> None:
    norm = RepBN(8, filtration=filtration)
    for _ in range(8):
        norm(torch.randn(16, 8))
    before = state(norm)
    norm(torch.randn(1, 8))
    norm(torch.randn(4, 8), torch.tensor([True, False, False, False]))
    for name, value in state(norm).items():
        assert torch.equal(value, before[name]) or name in ("step", "skips", "progress"), name
    assert torch.equal(norm.progress[::2], before["progress"][::2])
    assert norm.skips == 2
    scale_only = RepBN(8, center=False)  # a mean square it has
    scale_only(torch.full((1, 8), 3.0))
    torch.testing.assert_close(scale_only.running_var, torch.full((8,), 0.9 + 0.9))


def test_convert_sync_batchnorm_leaves_it_alone() -> None:
    norm = RepBN(8)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))[0] is norm
