"""RepBN over the mean absolute deviation: the formula in float64, its gradient, ranks, folding, converting."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import convert_norms, fold_norms, recalibrate_norms
from stabnorm.nn import PRepBN, RepBN
from stabnorm.ops import use_kernels
from tests.nn_modules import run, state
from tests.processes import one_after_the_other, run_ranks

masks = pytest.mark.parametrize("masked", [False, True])
centers = pytest.mark.parametrize("center", [True, False])


def deviation(x: Tensor, center: bool) -> Tensor:
    return math.sqrt(math.pi / 2) * (x - x.mean(0) if center else x).abs().mean(0)


def formula(norm: RepBN, x: Tensor, mask: Tensor | None) -> Tensor:
    """The one line that autograd differentiates; the statistics are of the valid tokens."""
    valid = x.flatten(0, -2) if mask is None else x[mask]
    mean = valid.mean(0) if norm.center else torch.zeros(x.shape[-1], dtype=x.dtype)
    sigma = (deviation(valid, norm.center).square() + norm.eps).sqrt()
    bias = 0 if norm.bias is None else norm.bias
    return (x - mean) / sigma * norm.weight + bias + norm.eta * x


def built(channels: int = 6, **options: Any) -> RepBN:
    norm = RepBN(channels, statistic="l1", **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.4)
    return norm


@centers
@masks
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_it_is_the_formula_and_autograd_gives_its_gradient(
    center: bool, masked: bool, dtype: torch.dtype, tolerance: float
) -> None:
    norm = built(center=center).to(dtype)
    x = (torch.rand(9, 50, 6, dtype=dtype) ** 3 * 4 - 1).requires_grad_()  # skew: signs do not sum to 0
    mask = torch.rand(9, 50) > 0.3 if masked else None
    upstream = torch.randn_like(x) if mask is None else torch.randn_like(x) * mask[..., None]
    y, want = norm(x, mask), formula(norm, x, mask)
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    inputs = [x, *norm.parameters()]
    for got, expected in zip(
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * (1 + float(expected.abs().max())))


@centers
@masks
def test_its_gradients_pass_gradcheck(center: bool, masked: bool) -> None:
    norm = built(5, center=center).double()
    names = [name for name, _ in norm.named_parameters()]
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True]] * 3) if masked else None
    valid = x.flatten(0, 1) if mask is None else x[mask]
    around = valid.mean(0) if center else 0
    assert (valid - around).abs().min() > 1e-4  # no kink within gradcheck's step
    x.requires_grad_()

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), (x, mask))
        return y if mask is None else y[mask]

    assert torch.autograd.gradcheck(function, (x, *norm.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@centers
def test_the_fast_kernels_equal_the_formula(dtype: torch.dtype, center: bool) -> None:
    norm = built(24, center=center).to(dtype)
    x, dy = torch.randn(70000, 24, dtype=dtype) + 3, torch.randn(70000, 24, dtype=dtype)  # several blocks
    fast = run(norm, x, dy)
    with use_kernels("reference"):
        plain = run(norm, x, dy)
    for got, want in zip(fast, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_on_gaussian_data_it_is_the_batch_norm_of_the_variance() -> None:
    """T23: with the factor sqrt(pi / 2) the two scales are the same."""
    norm, other = RepBN(4, statistic="l1"), RepBN(4)
    x = torch.randn(100_000, 4) * 3 + 1
    torch.testing.assert_close(norm(x), other(x), rtol=0.02, atol=0.02)
    torch.testing.assert_close(norm.running_var, other.running_var, rtol=0.02, atol=0)
    torch.testing.assert_close(norm.running_mean, other.running_mean)


def test_running_statistics_average_what_the_batches_have() -> None:
    norm = RepBN(6, statistic="l1", momentum=0.25)
    mean, square = torch.zeros(6), torch.ones(6)
    for _ in range(5):
        x = torch.randn(40, 6).exp()
        norm(x)
        mean.lerp_(x.mean(0), 0.25)
        square.lerp_(deviation(x, True).square() * 40 / 39, 0.25)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, square)


def test_an_outlier_moves_it_less_than_the_variance() -> None:
    x = torch.randn(500, 3)
    burst = torch.cat([x[:-1], torch.full((1, 3), 100.0)])
    moved = [
        norm.batch_statistics(burst)[1] / norm.batch_statistics(x)[1] for norm in (RepBN(3, statistic="l1"), RepBN(3))
    ]
    assert (moved[0] * 5 < moved[1]).all()


def test_a_nan_among_scale_only_values_is_a_skipped_batch() -> None:
    norm = RepBN(4, center=False, statistic="l1")  # there is no mean that would be NaN, too, and the sign of NaN is 0
    x = torch.randn(3, 10, 4)
    x[1, 2, 3] = torch.nan
    for mask in (None, torch.ones(3, 10, dtype=torch.bool)):
        before = state(norm)
        norm(x, mask)
        assert torch.equal(norm.running_var, before["running_var"])
        assert norm.skips == before["skips"] + 1


def test_an_input_without_deviation_is_divided_by_eps_and_has_a_gradient() -> None:
    norm = RepBN(3, statistic="l1")
    x = torch.full((20, 3), 2.0, requires_grad=True)
    norm(x).sum().backward()
    assert torch.isfinite(norm(x)).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_an_unknown_statistic_is_refused() -> None:
    with pytest.raises(ValueError, match=r"statistic='l3' is unknown\. Choose one of 'l2', 'l1'"):
        RepBN(4, statistic="l3")  # type: ignore[arg-type]


@pytest.mark.parametrize("to", ["repbn", "prepbn"])
def test_a_converted_model_trains_and_folds(to: str) -> None:
    model = nn.Sequential(
        nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)
    )
    report = convert_norms(model, to, statistic="l1", init="vision")
    assert len(report.converted) == 2
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.lam.zero_()
        if isinstance(module, RepBN):
            assert module.statistic == "l1"
            assert "statistic='l1'" in repr(module)
    for _ in range(8):
        model(torch.randn(64, 5)).square().sum().backward()
    model.double().eval()
    x = torch.randn(32, 5, dtype=torch.float64)
    before = model(x)
    result = fold_norms(model, x)
    assert {norm.status for norm in result.norms} == {"forward"}
    torch.testing.assert_close(result.model(x), before, rtol=1e-12, atol=1e-12)
    assert not any(isinstance(module, RepBN) for module in result.model.modules())


def test_a_prepbn_blends_into_it_in_one_way_on_all_backends() -> None:
    norm = PRepBN(8, statistic="l1")  # type: ignore[arg-type]
    norm.lam.fill_(0.25)
    x = torch.randn(64, 8).exp().requires_grad_()
    want = 0.25 * nn.functional.layer_norm(x, (8,)) + 0.75 * formula(norm.rep, x, None)
    (expected,) = torch.autograd.grad(want, x, torch.ones_like(x) * x.detach())
    for kernels in ("aten", "reference"):
        with use_kernels(kernels):
            y = norm(x)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(x) * x.detach())
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-4)


def test_recalibration_takes_the_median_of_the_batches_own() -> None:
    model = nn.Sequential(RepBN(4, statistic="l1"))
    batches = [torch.randn(32, 4).exp() for _ in range(7)]
    batches[2] *= 1000
    recalibrate_norms(model, batches, 7)
    each = torch.stack([deviation(x.double(), True).square() * 32 / 31 for x in batches])
    torch.testing.assert_close(model[0].running_var.double(), each.median(0).values, rtol=1e-5, atol=0)


def one_rank(rank: int, folder: Path, masked: bool) -> None:
    rows = slice(0, 5) if rank == 0 else slice(5, 8)
    results = []
    for norm in of_ranks():
        x, dy, mask = joined(masked)
        results.append((*run(norm, x[rows], dy[rows], None if mask is None else mask[rows]), state(norm)))
    torch.save(results, f"{folder}/{rank}.pt")


def of_ranks() -> list[RepBN]:
    return [RepBN(6, center=center, statistic="l1", sync=True) for center in (True, False)]


def joined(masked: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(8, 16, 6, generator=generator) for _ in range(2))
    x[:5] += 3  # ranks with different means: what each deviates from its own is not the deviation
    return x, dy, torch.rand(8, 16, generator=generator) > 0.4 if masked else None


@one_after_the_other
@pytest.mark.slow
@masks
def test_two_processes_equal_one_with_the_joined_batch(masked: bool, tmp_path: Path) -> None:
    run_ranks(one_rank, tmp_path, masked)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for index, norm in enumerate(of_ranks()):
        want = run(norm, *joined(masked))
        for part in (0, 1):
            both = torch.cat([rank[index][part] for rank in ranks])
            torch.testing.assert_close(both, want[part], rtol=1e-6, atol=3e-6)
        for rank in ranks:
            for key, value in state(norm).items():
                torch.testing.assert_close(rank[index][2][key], value, rtol=1e-6, atol=1e-6, msg=key)


def test_a_fit_to_the_standard_deviation_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    with pytest.raises(ValueError, match="statistic='l1' divides by another"):
        convert_norms(model, init="fit", statistic="l1", loader=[torch.randn(5, 4)])
    assert type(model[1]) is nn.LayerNorm
