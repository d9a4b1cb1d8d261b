"""Norms of convolutional nets: EstBatchNorm, BatchChannelNorm, EvoNorm-B0 and -S0, against float64 and by property."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabnorm import StabilityMonitor, StabNormError, fold_norms
from stabnorm.nn import BatchChannelNorm, EstBatchNorm, EvoNormB0, EvoNormS0

BUILD: dict[str, Any] = {
    "est": lambda: EstBatchNorm(6),
    "bcn": lambda: BatchChannelNorm(6, groups=3),
    "b0": lambda: EvoNormB0(6),
    "s0": lambda: EvoNormS0(6, groups=2),
}
every = pytest.mark.parametrize("name", BUILD)


def filled(norm: nn.Module) -> Any:
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.8, 0.3)
    return norm


def images(n: int = 3, size: int = 5, mean: float = 1.0) -> Tensor:
    return 2 * torch.randn(n, 6, size, size + 1, generator=torch.Generator().manual_seed(n)) + mean


def wide(t: Tensor) -> Tensor:
    return t.detach().double()[:, None, None]


def est_truth(norm: EstBatchNorm, x: Tensor) -> Tensor:
    z = (x.double() - wide(norm.running_mean)) / (wide(norm.running_var) + norm.eps).sqrt()
    return z * wide(norm.weight) + wide(norm.bias)


def test_estimates_follow_their_recursion_and_normalise_in_training_as_in_eval() -> None:
    norm = filled(EstBatchNorm(6, momentum=0.3))
    mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for step in range(4):
        x = images(3, 5, mean=step)
        y = norm(x)
        rows = x.double().movedim(1, -1).reshape(-1, 6)
        var = var + 0.3 * (rows.var(0) - var)
        mean = mean + 0.3 * (rows.mean(0) - mean)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y.double(), est_truth(norm, x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(norm).eval()(x), y, rtol=0, atol=0)


def test_at_momentum_0_the_estimates_never_change_and_a_broken_batch_never_enters_them() -> None:
    still, moving = EstBatchNorm(6, momentum=0), EstBatchNorm(6)
    for norm in (still, moving):
        norm(images())
    before = [still.running_mean.clone(), moving.running_var.clone()]
    still(images(4))
    moving(images(4) * float("nan"))
    moving(images(4)[:0])
    torch.testing.assert_close([still.running_mean, moving.running_var], before, rtol=0, atol=0)
    assert moving.skips == 2


def test_padding_does_not_enter_the_estimates() -> None:
    x = torch.randn(4, 6, 9) + 3
    mask = torch.rand(4, 9) > 0.4
    padded, packed = EstBatchNorm(6), EstBatchNorm(6)
    padded(torch.where(mask[:, None], x, 1e6), mask)
    packed(x.movedim(1, -1)[mask].T[None])
    torch.testing.assert_close(padded.running_mean, packed.running_mean)
    torch.testing.assert_close(padded.running_var, packed.running_var)


def test_batch_channel_norm_is_the_estimated_batch_norm_and_a_group_norm_with_a_gain_per_group() -> None:
    norm = filled(BatchChannelNorm(6, groups=3))
    for channel_dim, x in ((1, images()), (-1, images().movedim(1, -1))):
        twin = BatchChannelNorm(6, groups=3, channel_dim=channel_dim)
        twin.load_state_dict(norm.state_dict())
        y = twin(x)
        z = est_truth(twin.batch, x.movedim(channel_dim, 1)).unflatten(1, (3, 2))
        var, mean = torch.var_mean(z, (2, 3, 4), correction=0, keepdim=True)
        gain, bias = (t.detach().double()[:, None, None, None] for t in (twin.weight, twin.bias))
        expected = ((z - mean) / (var + twin.eps).sqrt() * gain + bias).flatten(1, 2).movedim(1, channel_dim)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)


def b0_truth(norm: EvoNormB0, x: Tensor, var: Tensor) -> Tensor:
    x = x.double()
    image = (x.var((2, 3), correction=0, keepdim=True) + norm.eps).sqrt()
    below = torch.maximum((wide(var) + norm.eps).sqrt().expand_as(x), wide(norm.v) * x + image)
    return x / below * wide(norm.weight) + wide(norm.bias)


def test_evonorm_b0_takes_the_batchs_variance_in_training_and_the_running_one_in_eval() -> None:
    norm = filled(EvoNormB0(6, momentum=0.25))
    x = images(4)
    var = x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm(x).double(), b0_truth(norm, x, var), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var, 1 + 0.25 * (var - 1))
    norm.eval()
    torch.testing.assert_close(norm(x).double(), b0_truth(norm, x, norm.running_var), rtol=1e-5, atol=1e-5)


def test_evonorm_s0_is_the_formula_and_no_image_changes_another() -> None:
    norm = filled(EvoNormS0(6, groups=2))
    x = images(4)
    groups = x.double().unflatten(1, (2, 3))
    std = (groups.var((2, 3, 4), correction=0, keepdim=True) + norm.eps).sqrt()
    swish = (x.double() * torch.sigmoid(wide(norm.v) * x.double())).unflatten(1, (2, 3))
    expected = (swish / std).flatten(1, 2) * wide(norm.weight) + wide(norm.bias)
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(x[2:3]), norm(x)[2:3])


@every
def test_an_image_of_one_pixel_gives_numbers_and_finite_gradients(name: str) -> None:
    norm, x = filled(BUILD[name]()), torch.randn(2, 6, 1, 1, requires_grad=True)
    y = norm(x)
    y.backward(torch.randn_like(y))
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@every
@pytest.mark.parametrize("training", [True, False])
def test_the_gradients_are_those_of_finite_differences(name: str, training: bool) -> None:
    norm = filled(BUILD[name]()).double()
    x = images(2, 2).double().requires_grad_()
    norm(x.detach())
    no_gradient_through_estimates = name in ("est", "bcn")  # so the difference quotient has more
    norm.train(training and not no_gradient_through_estimates)
    names = [name for name, _ in norm.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Any:
        buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        return torch.func.functional_call(norm, {**dict(zip(names, parameters, strict=True)), **buffers}, (x,))

    assert torch.autograd.gradcheck(run, (x, *(p.detach().requires_grad_() for p in norm.parameters())))


@every
def test_a_recomputed_forward_changes_no_statistic_and_gives_the_same_gradients(name: str) -> None:
    plain, saved = filled(BUILD[name]()), None
    saved = copy.deepcopy(plain)
    x, g = images(), torch.randn(3, 6, 5, 6)
    plain(x).backward(g)
    checkpoint(saved, x, use_reentrant=False).backward(g)
    torch.testing.assert_close(dict(saved.named_buffers()), dict(plain.named_buffers()))
    torch.testing.assert_close([p.grad for p in saved.parameters()], [p.grad for p in plain.parameters()])


@every
def test_repr_copy_pickle_state_and_low_precision(name: str) -> None:
    norm = filled(BUILD[name]())
    norm(images())
    norm.eval()
    expected = norm(images(4))
    assert type(norm).__name__ in repr(norm)
    fresh = BUILD[name]().eval()
    fresh.load_state_dict(norm.state_dict(), strict=True)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), fresh):
        torch.testing.assert_close(twin(images(4)), expected, rtol=0, atol=0)
    low = copy.deepcopy(norm).to(torch.bfloat16)
    assert all(b.dtype != torch.bfloat16 for b in low.buffers())
    y = low(images(4).bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).abs().max() < 0.05 * expected.abs().max()


@every
@pytest.mark.parametrize("training", [True, False])
def test_it_is_one_graph(name: str, training: bool) -> None:
    norm = filled(BUILD[name]()).train(training)
    twin = copy.deepcopy(norm)
    compiled: Any = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for n in (3, 3):
        torch.testing.assert_close(compiled(images(n)), norm(images(n)))
    torch.testing.assert_close(dict(twin.named_buffers()), dict(norm.named_buffers()))


def test_the_estimated_batch_norm_folds_and_the_others_say_why_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), filled(EstBatchNorm(6)), nn.ReLU()).double()
    model(torch.randn(4, 3, 7, 7, dtype=torch.float64))
    result = fold_norms(model.eval(), torch.randn(2, 3, 7, 7, dtype=torch.float64))
    assert result.norms[0].status == "backward"
    assert result.max_rel_error < 1e-12
    for name in ("b0", "s0"):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), BUILD[name]()).eval()
        with pytest.raises(StabNormError, match="so no weight can do it"):
            fold_norms(model, torch.randn(2, 3, 7, 7), strict=True)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), BUILD["bcn"]()).eval()
    result = fold_norms(model, torch.randn(2, 3, 7, 7))
    assert [(norm.name, norm.status) for norm in result.norms] == [("1", "kept"), ("1.batch", "backward")]


def test_the_batch_norm_inside_is_watched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), BUILD["bcn"]())
    with StabilityMonitor(model) as monitor:
        y = model(torch.randn(2, 3, 7, 7))
        y.backward(torch.randn_like(y))
        monitor.step()
    assert monitor.layers == ("1.batch",)


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"groups=4 does not divide num_features=6\. Give a divisor"):
        BatchChannelNorm(6, groups=4)
    with pytest.raises(ValueError, match="groups=4 does not divide"):
        EvoNormS0(6, groups=4)
    with pytest.raises(ValueError, match=r"reads \[N, C, H, W\], but its input has the shape \(2, 5, 3, 3\)"):
        EvoNormB0(6)(torch.randn(2, 5, 3, 3))
    with pytest.raises(ValueError, match="momentum=2"):
        EstBatchNorm(6, momentum=2)
