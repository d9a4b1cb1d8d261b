"""TaperNorm: the norm at lam = 1, one calibrated number times its gains at lam = 0, the blend between."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import convert_norms, fold_norms, recalibrate_norms
from stabnorm.errors import StabNormError
from stabnorm.nn import PRepBN, TaperNorm
from stabnorm.switch import ProgressiveSwitch
from tests.nn_modules import run


class OffsetRMSNorm(nn.Module):
    """Somebody's own RMSNorm, whose gain is 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return (1 + self.weight) * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    """A pre-norm MLP block."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + y


def drawn(norm: Any) -> Any:
    """Give a norm of torch's gains and biases that are not all one or zero."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    return norm


def tokens(seed: int = 0, width: int = 8) -> Tensor:
    """Tokens of different scales, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 7, width, generator=generator, dtype=torch.float64)
    return x * torch.rand(5, 7, 1, generator=generator, dtype=torch.float64).mul(3).exp()


def converted(norm: nn.Module, **options: Any) -> TaperNorm:
    convert_norms(nn.ModuleList([norm]), "taper", **options)
    assert isinstance(norm, TaperNorm)
    return norm


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_at_lam_one_it_is_the_norm(kind: str) -> None:
    plain = drawn(nn.LayerNorm(8) if kind == "layer" else nn.RMSNorm(8, 1e-5))
    norm = converted(copy.deepcopy(plain))
    x, dy = tokens().float(), torch.randn(5, 7, 8)
    for got, want in zip(run(norm, x, dy), run(plain, x, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # the bits of a sum depend on where it lies
    for name, parameter in plain.named_parameters():
        gradient = norm.get_parameter(name).grad
        assert gradient is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-5)
    for parameter in norm.rep.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_for_an_rms_norm_the_number_is_that_of_the_paper() -> None:
    plain = drawn(nn.RMSNorm(8, 1e-5).double())
    norm = converted(copy.deepcopy(plain), momentum=None)
    above = below = torch.zeros((), dtype=torch.float64)
    for seed in range(3):
        x = tokens(seed)
        norm(x)
        rms = (x.square().mean(-1) + 1e-5).sqrt()
        size = (x * plain.weight).square().sum(-1)
        above, below = above + (size / rms).mean(), below + size.mean()
    torch.testing.assert_close(norm.rep.scale, (above / below).detach()[None], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "make", [lambda: drawn(nn.LayerNorm(8)), lambda: drawn(nn.RMSNorm(8, 1e-5)), lambda: OffsetRMSNorm(8)]
)
def test_no_other_number_comes_closer_to_the_norm(make: Any) -> None:
    norm = converted(make().double(), momentum=None)
    x = tokens()
    target = norm(x).detach()
    norm.start_from_norm()
    norm.lam.zero_()

    @torch.no_grad()
    def error(factor: float) -> float:
        bias = 0 if norm.rep.bias is None else norm.rep.bias
        return float((factor * (norm(x) - bias) + bias - target).square().sum())

    assert error(1) < min(error(0.999), error(1.001))
    slope = (error(1 + 1e-4) - error(1 - 1e-4)) / 2e-4
    assert abs(slope) < 1e-6 * error(1)


def test_the_average_forgets_with_its_momentum_and_the_first_batch_counts_in_full() -> None:
    norm = converted(nn.RMSNorm(8, 1e-5).double(), momentum=0.25)
    norm(tokens(0))
    first = norm.rep.scale.clone()
    alone = converted(nn.RMSNorm(8, 1e-5).double(), momentum=1.0)
    alone(tokens(0))
    torch.testing.assert_close(first, alone.rep.scale, rtol=1e-12, atol=0)
    alone(tokens(1))
    norm(tokens(1))
    assert torch.minimum(first, alone.rep.scale) < norm.rep.scale < torch.maximum(first, alone.rep.scale)


def test_between_it_is_the_blend_and_its_gradient() -> None:
    norm = converted(drawn(nn.LayerNorm(8).double()))
    x = tokens().requires_grad_()
    norm(x)
    norm.start_from_norm()
    norm.lam.fill_(0.3)
    plain, c = drawn(nn.LayerNorm(8).double()), norm.rep.scale.clone()
    plain.load_state_dict({name: norm.get_parameter(name).detach() for name in ("weight", "bias")})
    gain, offset = (t.detach().clone().requires_grad_() for t in (plain.weight, plain.bias))
    dy = torch.randn(5, 7, 8, dtype=torch.float64)
    y, dx = run(norm, x, dy)
    want = 0.3 * plain(x) + 0.7 * (c * gain * x + offset)
    (want_dx,) = torch.autograd.grad(want, x, dy, retain_graph=True)
    want.backward(dy)
    torch.testing.assert_close(y, want.detach())
    torch.testing.assert_close(dx, want_dx)
    for name, parameter in (("weight", plain.weight), ("bias", plain.bias), ("rep.weight", gain), ("rep.bias", offset)):
        torch.testing.assert_close(norm.get_parameter(name).grad, parameter.grad)


def test_once_lam_has_left_one_the_number_stays() -> None:
    norm = converted(nn.LayerNorm(8))
    norm(tokens(0).float())
    before = norm.rep.scale.clone()
    norm.lam.fill_(0.9)
    norm(100 * tokens(1).float())
    assert torch.equal(norm.rep.scale, before)


def test_a_schedule_that_begins_below_one_calibrates_with_its_first_batch() -> None:
    norm = converted(nn.RMSNorm(8))
    norm.lam.fill_(0.5)
    assert norm.rep.scale == 1
    norm(10 * torch.randn(64, 8))
    first = norm.rep.scale.clone()
    assert 0.05 < first < 0.2
    norm(torch.randn(64, 8))
    assert torch.equal(norm.rep.scale, first)


@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
@pytest.mark.parametrize("lam", [1.0, 0.0])
def test_padding_changes_neither_the_number_nor_a_gain(garbage: float, lam: float) -> None:
    norm, packed = (converted(nn.RMSNorm(8, 1e-5)) for _ in range(2))
    mask = torch.rand(5, 7) > 0.4
    x = torch.where(mask[..., None], tokens().float(), garbage)
    for each in (norm, packed):
        each.lam.fill_(lam)
        each.leave_out_norm = lam == 0  # else the norm has a gradient of garbage that is its own
    y = norm(x, mask)
    want = packed(x[mask])
    torch.testing.assert_close(y[mask], want)
    torch.testing.assert_close(norm.rep.scale, packed.rep.scale)
    y.backward(mask[..., None].expand_as(y).float())
    want.backward(torch.ones_like(want))
    torch.testing.assert_close(norm.rep.weight.grad, packed.rep.weight.grad)


def test_second_derivatives_are_right_in_training() -> None:
    norm = converted(drawn(nn.LayerNorm(4).double()))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    norm(x)
    norm.lam.fill_(0.4)
    assert torch.autograd.gradgradcheck(norm, x)


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
def test_a_pre_norm_model_folds_exactly_at_lam_zero(make: Any) -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), *(Block(8, drawn(make(8))) for _ in range(2)), drawn(make(8)), nn.Linear(8, 3)
    ).double()
    convert_norms(model, "taper")
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    model(x)
    for norm in model.modules():
        if isinstance(norm, TaperNorm):
            norm.start_from_norm()
            norm.lam.zero_()
    model.eval()
    result = fold_norms(model, x)
    assert [norm.status for norm in result.norms] == ["forward"] * 3
    assert not any(isinstance(part, nn.LayerNorm | nn.RMSNorm | TaperNorm) for part in result.model.modules())
    want = model(x)
    assert (result.model(x) - want).abs().max() / want.abs().max() < 1e-12


def test_before_the_end_it_does_not_fold_and_says_why() -> None:
    norm = converted(nn.LayerNorm(8))
    norm.lam.fill_(0.25)
    with pytest.raises(StabNormError, match=r"TaperNorm at lam=0\.25 still holds a share of LayerNorm"):
        norm.fold_affine()
    norm.lam.zero_()
    norm.rep.weight.data[2] = torch.inf
    with pytest.raises(StabNormError, match="not finite"):
        norm.fold_affine()


def test_a_checkpoint_of_the_norm_loads_and_its_own_loads_in_the_middle() -> None:
    plain = drawn(nn.LayerNorm(8))
    norm = TaperNorm(8)
    norm.load_state_dict(plain.state_dict())
    x = tokens().float()
    torch.testing.assert_close(norm(x), plain(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(norm.rep.weight, plain.weight)
    norm.lam.fill_(0.5)
    again = TaperNorm(8)
    again.load_state_dict(norm.state_dict())
    torch.testing.assert_close(again(x), norm(x), rtol=1e-6, atol=1e-6)
    twin = pickle.loads(pickle.dumps(norm))
    assert type(twin) is type(norm)
    torch.testing.assert_close(twin(x), norm(x), rtol=1e-6, atol=1e-6)


def test_it_takes_other_axes_and_any_width() -> None:
    images = TaperNorm(8, channel_dim=1)
    x = torch.randn(4, 8, 3, 3)
    images(x)
    images.lam.zero_()
    torch.testing.assert_close(images(x), images.rep.scale * x)
    pair = TaperNorm((2, 4))
    y = torch.randn(5, 2, 4)
    torch.testing.assert_close(pair(y), nn.functional.layer_norm(y, (2, 4)), rtol=1e-6, atol=1e-6)
    alone = TaperNorm(8, momentum=0.01)
    alone(y.flatten(1))
    torch.testing.assert_close(pair.rep.scale, alone.rep.scale)


def test_there_is_nothing_to_recalibrate() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    convert_norms(model, "taper")
    with pytest.raises(ValueError, match="no norm with running statistics"):
        recalibrate_norms(model, [torch.randn(8, 4)], 1)
    both = nn.Sequential(nn.Linear(4, 8), PRepBN(8), nn.LayerNorm(8))
    convert_norms(both, "taper")
    report = recalibrate_norms(both, [torch.randn(8, 4)], 1)
    assert report.norms == ("1",)
    assert "calibrated with the norm" in report.left["2"]


@pytest.mark.parametrize("option", [{"eps": 1e-3}, {"bias": False}, {"eta": 1}])
def test_a_conversion_takes_only_options_that_it_can_keep(option: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(option))):
        convert_norms(nn.Sequential(nn.LayerNorm(8)), "taper", **option)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="momentum=0"):
        TaperNorm(8, momentum=0)
    with pytest.raises(ValueError, match="kind='batch'"):
        TaperNorm(8, kind="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="momentum=2"):
        convert_norms(nn.Sequential(nn.LayerNorm(8)), "taper", momentum=2)


@pytest.mark.parametrize("schedule", ["cosine", "adaptive"])
def test_a_schedule_takes_it_to_a_model_that_folds(schedule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Block(8, nn.LayerNorm(8)), nn.LayerNorm(8), nn.Linear(8, 3))
    convert_norms(model, "taper")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    switch = ProgressiveSwitch(model, total_steps=40, schedule=schedule)
    for _ in range(40):
        switch.begin()
        optimizer.zero_grad()
        model(torch.randn(32, 6)).square().mean().backward()
        optimizer.step()
        switch.step()
    switch.close()
    assert switch.lam == [0.0, 0.0]
    assert "2 of 2 layers switched to CalibratedScale" in switch.summary()
    x = torch.randn(16, 6)
    result = fold_norms(model.eval(), x)
    assert all(norm.status != "kept" for norm in result.norms)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
