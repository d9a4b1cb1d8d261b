"""DyT, Derf and SRMSNorm: the formula, conversion, the fold of the gain, and the refusal to fold whole."""

import copy
import io
import pickle
from typing import Any

import pytest
import scipy.special
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, StabNormError, convert_norms, fold_norms
from stabnorm.fold import fold_gains
from stabnorm.nn import Derf, DyT, SRMSNorm

CLASSES: dict[str, type[Any]] = {"dyt": DyT, "derf": Derf, "srms": SRMSNorm}


def filled(norm: nn.Module) -> Any:
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.7, 0.3)
    return norm


def truth(norm: Any, x: Tensor) -> Tensor:
    """The papers' formulas in float64, with scipy's error function."""
    wide = x.double().movedim(norm.channel_dim, -1)
    if isinstance(norm, SRMSNorm):
        y = wide / (wide.square().sum(-1, keepdim=True) / wide.shape[-1] + norm.eps).sqrt()
    elif isinstance(norm, DyT):
        y = norm.weight.double() * torch.tanh(norm.alpha.double() * wide) + norm.bias.double()
    else:
        bent = scipy.special.erf((norm.alpha.double() * wide + norm.shift.double()).detach().numpy())
        y = norm.weight.double() * torch.from_numpy(bent) + norm.bias.double()
    return y.movedim(-1, norm.channel_dim)


@pytest.mark.parametrize("cls", CLASSES.values())
@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_the_output_is_the_formula(cls: Any, channel_dim: int, dtype: torch.dtype, tolerance: float) -> None:
    norm = filled(cls(5, channel_dim=channel_dim)).to(dtype)
    x = 3 * torch.randn(4, 5, 7, dtype=dtype) if channel_dim == 1 else 3 * torch.randn(4, 7, 5, dtype=dtype)
    torch.testing.assert_close(norm(x).double(), truth(norm, x), rtol=tolerance, atol=tolerance)
    assert norm(x).dtype == dtype
    assert norm(x[:0]).shape == x[:0].shape


@pytest.mark.parametrize("cls", CLASSES.values())
def test_the_gradients_are_those_of_the_formula(cls: Any) -> None:
    norm = filled(cls(3)).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
    inputs = [x, *norm.parameters()]
    g = torch.randn(4, 3, dtype=torch.float64)
    if not isinstance(norm, Derf):  # whose truth is numpy's
        got = torch.autograd.grad(norm(x), inputs, g)
        torch.testing.assert_close(got, torch.autograd.grad(truth(norm, x), inputs, g))


@pytest.mark.parametrize("to", CLASSES)
def test_conversion_keeps_the_gain_and_bias_and_they_load_strictly(to: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    gain, bias = model[1].weight, model[1].bias
    assert convert_norms(model, to).converted == ["1"]
    assert type(model[1]) is CLASSES[to]
    if to != "srms":
        assert model[1].weight is gain
        assert model[1].bias is bias
    twin = copy.deepcopy(model)
    filled(model)
    twin.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(3, 4)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert convert_norms(model, to).left["1"].startswith("already converted")


def test_srms_refuses_to_lose_a_gain_and_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(4, 8), filled(nn.LayerNorm(8)))
    with pytest.raises(StabNormError, match="its gain would be lost"):
        convert_norms(model, "srms")
    assert type(model[1]) is nn.LayerNorm


@pytest.mark.parametrize("to", CLASSES)
def test_they_are_kept_by_the_fold_with_the_reason(to: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    convert_norms(model, to)
    with pytest.warns(UserWarning, match="nothing is folded"):
        result = fold_norms(model, torch.randn(3, 4))
    assert [norm.status for norm in result.norms] == ["kept"]
    assert "no weight can do it" in result.norms[0].reason
    with pytest.raises(StabNormError, match="no weight can do it"):
        fold_norms(model, torch.randn(3, 4), strict=True)


@pytest.mark.parametrize("to", ["dyt", "derf"])
def test_gain_and_bias_fold_into_what_reads_them(to: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).double().eval()
    convert_norms(model, to)
    filled(model)
    result = fold_gains(model, torch.randn(3, 4, dtype=torch.float64))
    assert result.norms[0].into == ("2",)
    assert result.max_rel_error < 1e-12
    assert result.model.get_parameter("1.weight").unique().tolist() == [1.0]
    x = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", CLASSES.values())
def test_repr_copies_pickles_scripts_exports_and_compiles(cls: Any) -> None:
    norm, x = filled(cls(6)), torch.randn(5, 6)
    y = norm(x)
    assert cls.__name__ in repr(norm)
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(norm),
        pickle.loads(pickle.dumps(norm)),
        torch.load(buffer, weights_only=False),
        torch.export.export(norm, (x,)).module(),
        torch.compile(norm, backend="eager", fullgraph=True),
        torch.fx.symbolic_trace(nn.Sequential(norm)),
        torch.jit.script(copy.deepcopy(norm)),
    ):
        torch.testing.assert_close(twin(x), y)


def test_an_srms_norm_is_watched_as_an_rms_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 8), SRMSNorm(8))
    with StabilityMonitor(model) as monitor:
        model(torch.randn(5, 4)).backward(torch.randn(5, 8))
        monitor.step()
    assert monitor.layers == ("1",)
    assert monitor.history()["amax"].isfinite().all()


@pytest.mark.parametrize("cls", [DyT, Derf])
@pytest.mark.parametrize("value", [0, -1, float("nan"), "x", None])
def test_an_alpha_that_squashes_nothing_is_refused(cls: Any, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"alpha=.*Give a number above 0"):
        cls(4, alpha=value)
