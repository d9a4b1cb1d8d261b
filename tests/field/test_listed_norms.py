"""Whatever normalises is in the report: norms that do more, functions in a forward, classes that nobody knows."""

import copy
import json
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabnorm import StabNormError, apply_manifest, find_norms, fold_norms
from stabnorm.nn import RepBN
from tests.fold.nets import Net, draw, error_of

C, D = 4, 3


@torch.no_grad()
def ready(model: nn.Module) -> nn.Module:
    """In eval and float64, with everything drawn; a variance is positive."""
    generator = torch.Generator().manual_seed(0)
    for name, t in model.double().state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.randn(t.shape, generator=generator))
            if name.endswith("running_var"):
                t.copy_(t.abs() + 0.5)
    return model.eval()


class BatchNormAct(nn.BatchNorm2d):
    """As in timm: a BatchNorm, a dropout and an activation in one module."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        y: Tensor = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return self.act(self.drop(y))  # type: ignore[no-any-return]


class Frozen(nn.Module):
    """As in torchvision and DETR: four buffers, and eps in the code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class FrozenBatchNorm2d(Frozen):
    pass


def activated(act: nn.Module) -> nn.Module:
    return ready(nn.Sequential(nn.Conv2d(3, C, 3, bias=False), BatchNormAct(C, act), nn.Conv2d(C, D, 1)))


# --- BatchNorms that do more ---


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(), nn.Identity(), nn.Hardswish(inplace=True)], ids=str)
def test_the_batch_norm_inside_folds_and_its_activation_stays(act: nn.Module) -> None:
    model = activated(act)
    result = fold_norms(model, draw(2, 3, 8, 8), strict=True)
    assert [(norm.name, norm.status) for norm in result.norms] == [
        ("1", "forward" if isinstance(act, nn.Identity) else "backward")
    ]
    assert error_of(result.model, model, [(draw(3, 3, 9, 7, seed=1),)]) < 1e-12
    assert not [name for name, _ in result.model.named_modules() if "running" in name]
    graph = str(torch.export.export(result.model, (draw(2, 3, 8, 8),)).graph)
    assert "batch_norm" not in graph


def test_one_that_finds_no_place_is_a_multiply_add_and_its_activation() -> None:
    model = ready(nn.Sequential(BatchNormAct(3, nn.ReLU()), nn.Conv2d(3, D, 3)))
    result = fold_norms(model, draw(2, 3, 8, 8))
    assert [norm.status for norm in result.norms] == ["affine"]
    assert error_of(result.model, model, [(draw(3, 3, 9, 7, seed=1),)]) < 1e-12


def test_an_activation_that_wrote_into_the_norm_s_output_does_not_write_into_what_the_norm_read() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.conv(x)
        return m.after(m.norm(h)) + h.mean()

    model = ready(
        Net(forward, conv=nn.Conv2d(3, C, 3), norm=BatchNormAct(C, nn.ReLU(inplace=True)), after=nn.Conv2d(C, D, 1))
    )
    result = fold_norms(model, draw(2, 3, 8, 8))
    assert [norm.status for norm in result.norms] == ["affine"]
    assert error_of(result.model, model, [(draw(3, 3, 9, 7, seed=1),)]) < 1e-12


class BatchNormLeaky(nn.BatchNorm2d):
    """Its activation is a function."""

    def __init__(self, channels: int, slope: float = 0.1) -> None:
        super().__init__(channels)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), self.slope)


class DerivedBatchNorm(BatchNormLeaky):
    pass


class BatchNormInPlace(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class BatchNormPRelu(nn.BatchNorm2d):
    """A child with a weight, and a function."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(super().forward(x)).square()
        return y


@pytest.mark.parametrize("kind", [BatchNormLeaky, DerivedBatchNorm, BatchNormInPlace, BatchNormPRelu])
@pytest.mark.parametrize("place", ["behind a layer", "first"])
def test_the_norm_inside_a_batch_norm_that_calls_a_function_folds(kind: type[nn.BatchNorm2d], place: str) -> None:
    def build() -> nn.Module:
        first: nn.Module = nn.Conv2d(C, C, 3) if place == "behind a layer" else nn.Identity()
        return ready(nn.Sequential(first, kind(C), nn.Conv2d(C, D, 1)))

    model = build()
    result = fold_norms(model, draw(2, C, 8, 8), strict=True)
    assert [norm.status for norm in result.norms] == ["backward" if place == "behind a layer" else "affine"]
    inputs = [(draw(3, C, 9, 7, seed=1),)]
    assert error_of(result.model, model, inputs) < 1e-12
    fresh = apply_manifest(build(), json.loads(json.dumps(result.manifest)))
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    for other in (fresh, copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        assert error_of(other, model, inputs) < 1e-12
    assert find_norms(result.model) == []
    torch._dynamo.reset()  # torch 2.6 exports a class only eight times
    assert "batch_norm" not in str(torch.export.export(result.model, (draw(2, C, 8, 8),)).graph)


def test_such_a_fold_is_saved_and_loaded() -> None:
    result = fold_norms(activated(nn.ReLU()), draw(2, 3, 8, 8))
    fresh = apply_manifest(activated(nn.ReLU()), json.loads(json.dumps(result.manifest)))
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert torch.equal(fresh(draw(2, 3, 8, 8)), result.model(draw(2, 3, 8, 8)))


@pytest.mark.parametrize("kind", [Frozen, FrozenBatchNorm2d])
def test_a_frozen_batch_norm_is_affine_by_what_it_computes(kind: type[Frozen]) -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, C, 3, bias=False), kind(C), nn.ReLU(), nn.Conv2d(C, D, 1)))
    result = fold_norms(model, draw(2, 3, 8, 8), strict=True)
    assert [norm.status for norm in result.norms] == ["backward"]
    assert error_of(result.model, model, [(draw(3, 3, 9, 7, seed=1),)]) < 1e-12


# --- what stays is listed, and strict raises ---


class BatchNormGate(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x) * x


class GateBehind(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x


FUNCTIONS = {
    "layer_norm": lambda m, x: m.fc(F.layer_norm(m.norm(x), (C,))),
    "rms_norm": lambda m, x: m.fc(F.rms_norm(m.norm(x), (C,))),
    "native_layer_norm": lambda m, x: m.fc(torch.native_layer_norm(m.norm(x), (C,), None, None, 1e-5)[0]),
    "local_response_norm": lambda m, x: m.fc(F.local_response_norm(m.norm(x)[None], 2)[0]),
    "group_norm": lambda m, x: m.fc(F.group_norm(m.norm(x), 2)),
    "batch_norm": lambda m, x: m.fc(F.batch_norm(m.norm(x), m.fc.weight.new_zeros(C), m.fc.weight.new_ones(C))),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_that_normalises_in_a_forward_is_listed_as_kept(function: str) -> None:
    model = ready(nn.Sequential(nn.Linear(D, C), Net(FUNCTIONS[function], norm=RepBN(C), fc=nn.Linear(C, D))))
    result = fold_norms(model, draw(5, D))
    assert {norm.name: norm.status for norm in result.norms} == {"1": "kept", "1.norm": "backward"}
    assert f"calls {function} itself" in result.norms[0].reason
    with pytest.raises(StabNormError, match=rf"1 norms are kept, the first is '1': its forward calls {function}"):
        fold_norms(model, draw(5, D), strict=True)


class StandardizedConv(nn.Conv2d):
    """As timm's StdConv2d: the function normalises the weight, not an activation."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_a_function_that_normalises_a_weight_is_no_norm_that_stays() -> None:
    model = ready(nn.Sequential(StandardizedConv(3, C, 3), RepBN(C, channel_dim=1), nn.Conv2d(C, D, 1)))
    result = fold_norms(model, draw(2, 3, 8, 8), strict=True)
    assert {norm.name: norm.status for norm in result.norms} == {"1": "forward"}


def test_a_norm_that_nobody_understands_is_listed_as_kept_and_strict_raises() -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, C, 3), BatchNormGate(C), nn.Conv2d(C, D, 1)))
    with pytest.warns(UserWarning, match="BatchNormGate"):
        result = fold_norms(model, draw(2, 3, 8, 8))
    assert [(norm.name, norm.status) for norm in result.norms] == [("1", "kept")]
    with pytest.warns(UserWarning, match="BatchNormGate"), pytest.raises(StabNormError, match="BatchNormGate"):
        fold_norms(model, draw(2, 3, 8, 8), strict=True)


def test_a_norm_that_goes_on_with_its_own_input_is_listed_as_kept_without_a_warning_about_its_class() -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, C, 3), GateBehind(C), RepBN(C, channel_dim=1), nn.Conv2d(C, D, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fold_norms(model, draw(2, 3, 8, 8))
    assert {norm.name: norm.status for norm in result.norms} == {"1": "kept", "2": "forward"}
    assert "GateBehind is not known to be affine in eval" in result.norms[0].reason


def test_a_module_that_is_listed_already_is_not_listed_again_for_its_function() -> None:
    model = ready(nn.Sequential(RepBN(C), nn.Linear(C, C), nn.LayerNorm(C), nn.GroupNorm(2, C), nn.Linear(C, D)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fold_norms(model, draw(5, C))
    assert [(norm.name, norm.status) for norm in result.norms] == [("0", "forward"), ("2", "kept"), ("3", "kept")]


def test_a_model_that_was_never_switched_is_warned_of() -> None:
    model = ready(nn.Sequential(nn.Linear(D, C), nn.LayerNorm(C), nn.Linear(C, D)))
    with pytest.warns(
        UserWarning, match=r"nothing is folded: no norm is affine in eval. '1': LayerNorm.*convert_norms"
    ):
        result = fold_norms(model, draw(5, D))
    assert [norm.status for norm in result.norms] == ["kept"]
