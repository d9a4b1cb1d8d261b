"""Torch's settings around a call (default dtype and device, inference mode, autocast) do not change what it does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import (
    StabNormError,
    apply_manifest,
    convert_norms,
    fold_norms,
    guard_folds,
    plan_fold,
    recalibrate_norms,
    remove_norms,
)
from stabnorm.nn import PRepBN
from tests.torch_settings import default_dtype, deterministic

C = 300  # more than bfloat16 can count


SETTINGS: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
}
each_setting = pytest.mark.parametrize("setting", SETTINGS)


class Block(nn.Module):
    """A norm that folds forward and needs a bias, one that folds backward, and one that becomes a multiply-add."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(C), nn.Linear(C, C, bias=False)
        self.inner, self.last, self.head = nn.RMSNorm(C), nn.LayerNorm(C), nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = x + torch.relu(self.inner(self.fc(self.norm(x))))
        return self.head(torch.relu(self.last(y)))  # type: ignore[no-any-return]


def switched(*, trained: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Block()
    convert_norms(model)
    for module in model.modules():
        if isinstance(module, PRepBN) and not trained:
            module.lam.zero_()
            if module.rep.running_mean is not None:
                module.rep.running_mean.normal_()
            module.rep.running_var.uniform_(0.5, 2.0)
    return model.eval()


def assert_same_and_trainable(model: nn.Module, expected: nn.Module) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for key, tensor in state.items():
        assert (tensor.dtype, tensor.device) == (wanted[key].dtype, wanted[key].device), key
        assert not tensor.is_inference(), key
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-6, atol=1e-7, msg=key)
    model(torch.ones(4, C)).sum().backward()
    model.load_state_dict(wanted)


@each_setting
def test_a_fold_is_the_same(setting: str) -> None:
    x = torch.randn(4, C, generator=torch.Generator().manual_seed(1))
    model, expected = switched(), fold_norms(switched(), x)
    assert [norm.status for norm in expected.norms] == ["forward", "backward", "affine"]
    assert "fc.bias" in expected.manifest["biases"]
    with SETTINGS[setting]():
        result = fold_norms(model, x)
    assert [(norm.name, norm.status, norm.into) for norm in result.norms] == [
        (norm.name, norm.status, norm.into) for norm in expected.norms
    ]
    assert (result.precision, result.manifest) == (expected.precision, expected.manifest)
    assert_same_and_trainable(result.model, expected.model)
    with SETTINGS[setting]():
        apply_manifest(model, expected.manifest)
    model.load_state_dict(expected.model.state_dict())
    assert_same_and_trainable(model, expected.model)


@each_setting
def test_a_plan_is_the_same(setting: str) -> None:
    model, x = switched(trained=True), torch.randn(16, C, generator=torch.Generator().manual_seed(1))
    with SETTINGS[setting]():
        plan = plan_fold(model, x)
    assert [norm.status for norm in plan.norms] == ["forward", "backward", "affine"]


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting != "autocast"])  # which rounds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_statistics_that_are_measured_anew_keep_their_digits(setting: str, dtype: torch.dtype) -> None:
    batches = [number + torch.randn(8, C, generator=torch.Generator().manual_seed(number)) for number in range(3)]
    batches = [batch.to(dtype) for batch in batches]
    model, expected = switched().to(dtype), switched().to(dtype)
    recalibrate_norms(expected, batches, 3)
    with SETTINGS[setting]():
        recalibrate_norms(model, batches, 3)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    mean = torch.stack([batch.mean(0) for batch in batches]).median(0).values
    measured = model.norm.rep.running_mean  # type: ignore[union-attr]
    torch.testing.assert_close(measured, mean, rtol=1e-13 if dtype == torch.float64 else 1e-5, atol=1e-14)


class AnyWidthRMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("to", ["prepbn", "repbn", "unified", "power"])
def test_a_norm_that_learns_its_width_in_a_validation_is_trained_afterwards(to: str) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 6), AnyWidthRMSNorm(), nn.Linear(6, 2))
    convert_norms(model, to)
    with torch.inference_mode():
        model.eval()(torch.randn(3, 4))
    model.train()(torch.randn(3, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(parameter.grad is not None for parameter in model[1].parameters())


def test_lam_of_a_norm_that_was_converted_in_inference_mode_moves() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with torch.inference_mode():
        convert_norms(model)
    model[1].lam.fill_(0.5)
    model(torch.randn(3, 4)).sum().backward()
    assert model[1].rep.eta.grad is not None


def test_a_guard_that_is_set_in_inference_mode_judges_forwards_in_any_mode() -> None:
    x = torch.randn(8, C)
    folded = fold_norms(switched(), x).model
    with torch.inference_mode():
        guard = guard_folds(folded, [x], "raise")
        folded(x)
    with guard:
        folded(x)
        with pytest.raises(StabNormError, match="read values beyond"):
            folded(50 * x)


def test_a_removal_in_inference_mode_gives_a_model_that_trains() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    batches = [torch.randn(16, 4) for _ in range(4)]
    with torch.inference_mode():
        removed = remove_norms(model, batches).model
    removed(torch.randn(3, 4)).sum().backward()
    torch.optim.SGD(removed.parameters(), 0.1).step()


# --- transforms of torch.func ---


@pytest.mark.parametrize("to", ["prepbn", "repbn", "unified", "power"])
def test_in_training_a_transform_is_refused_before_a_statistic_moves(to: str) -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    convert_norms(model, to)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for transform in (torch.func.vmap, torch.func.jacrev):
        with pytest.raises(StabNormError, match=r"a transform of torch\.func .* does not allow\. Call eval\(\)"):
            transform(model)(torch.randn(3, 4, 8))
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
