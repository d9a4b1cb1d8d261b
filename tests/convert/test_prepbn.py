"""The norm object under its new class: whatever its build, precision and place, nothing changes at lam = 1."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabnorm import convert_norms, find_norms
from stabnorm.nn import PRepBN, RepBN
from tests.families import FAMILIES
from tests.families.decoders import LlamaRMSNorm
from tests.nn_modules import compile_one_graph


class EitherNorm(nn.Module):
    """ConvNeXt's own: one class, two layouts."""

    def __init__(self, dim: int, data_format: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps, self.data_format = 1e-6, data_format

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight[:, None, None] + self.bias[:, None, None]


def mixed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.RMSNorm(8))


# --- every kind of norm ---


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(8, elementwise_affine=False),
        nn.LayerNorm(8, bias=False),
        nn.LayerNorm((3, 8)),
        nn.RMSNorm(8),
        nn.RMSNorm(8, eps=1e-3, elementwise_affine=False),
    ],
    ids=str,
)
def test_norms_of_every_build_are_converted_without_a_change(norm: nn.Module) -> None:
    plain = copy.deepcopy(norm)
    convert_norms(norm)
    x, dy = torch.randn(4, 3, 8, requires_grad=True), torch.randn(4, 3, 8)
    y, z = plain(x), norm(x)
    assert torch.equal(z, y)
    assert torch.equal(torch.autograd.grad(z, x, dy)[0], torch.autograd.grad(y, x, dy)[0])
    norm.load_state_dict(plain.state_dict())
    assert isinstance(norm, PRepBN)
    norm.lam.zero_()
    assert not torch.allclose(norm(x), y)


def test_one_class_in_two_widths_and_two_layouts_stays_apart() -> None:
    model = nn.ModuleList([
        EitherNorm(8, "channels_last"), EitherNorm(6, "channels_first"), LlamaRMSNorm(8), LlamaRMSNorm(4, eps=1e-3),
    ])  # fmt: skip
    before = [(layer.channel_dim, layer.num_features, layer.eps) for layer in find_norms(model)]
    inputs = [torch.randn(2, 5, 8), torch.randn(2, 6, 3, 5), torch.randn(2, 5, 8), torch.randn(2, 5, 4)]
    outputs = [norm(x) for norm, x in zip(model, inputs, strict=True)]
    convert_norms(model)
    assert [(layer.channel_dim, layer.num_features, layer.eps) for layer in find_norms(model)] == before
    for norm, x, y in zip(model, inputs, outputs, strict=True):
        assert torch.equal(norm(x), y)
        norm.lam.zero_()  # type: ignore[operator]
        assert norm(x).shape == y.shape


def test_a_shared_module_stays_one_and_hooks_go_on() -> None:
    norm, seen = nn.LayerNorm(8), list[str]()
    norm.register_forward_pre_hook(lambda *_: seen.append("before"))
    handle = norm.register_forward_hook(lambda *_: seen.append("after"))
    model = nn.Sequential(norm, nn.Linear(8, 8), norm)
    assert convert_norms(model).converted == ["0"]
    assert model[0] is model[2] is norm
    model(torch.randn(2, 8))
    handle.remove()
    norm(torch.randn(2, 8))
    assert seen == ["before", "after"] * 2 + ["before"]


def test_the_input_may_still_come_by_the_name_the_norm_gave_it() -> None:
    class NamedNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, hidden_states: Tensor) -> Tensor:
            y: Tensor = self.weight * nn.functional.rms_norm(hidden_states, (8,), eps=1e-6)
            return y

    x, mask = torch.randn(2, 3, 8), torch.rand(2, 3) > 0.3
    for norm, name in ((NamedNorm(), "hidden_states"), (nn.LayerNorm(8), "input")):
        before = norm(**{name: x})
        convert_norms(norm)
        assert isinstance(norm, PRepBN)
        assert torch.equal(norm(**{name: x}), before)
        norm.lam.fill_(0.3)
        by_position = norm.eval()(x)
        assert not torch.equal(by_position, before)
        for call in ({name: x}, {"x": x}, {name: x, "mask": mask}):
            assert torch.equal(norm(**call), by_position)
        with pytest.raises(TypeError, match="'y'"):
            norm(y=x)


def test_options_reach_every_norm_and_the_defaults_are_those_of_a_switched_model() -> None:
    model = mixed()
    convert_norms(model, momentum=0.2, init="language", sync=True, eval_mode="rep", eps=1e-4, filtration=None)
    for each in (model[1], model[4]):
        assert isinstance(each, PRepBN)
        norm, rep = each, each.rep
        assert (norm.eval_mode, rep.momentum, rep.init, rep.sync, rep.eps, rep.filtration) == (
            "rep", 0.2, "language", True, 1e-4, None
        )  # fmt: skip
    bert = nn.Sequential(nn.LayerNorm(8, eps=1e-12))
    convert_norms(bert)
    assert isinstance(bert[0], PRepBN)
    assert bert[0].eps == 1e-12  # its own
    assert (bert[0].rep.eps, bert[0].rep.filtration) == (1e-5, "calibrated")


# --- where and in what precision ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("as_default", [True, False], ids=["built under the default", "cast"])
def test_parameters_follow_the_norm_and_statistics_stay_float32(dtype: torch.dtype, as_default: bool) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if as_default else before)
    try:
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)).to(dtype)
        plain = copy.deepcopy(model)
        convert_norms(model)
        assert torch.get_default_dtype() == (dtype if as_default else before)
    finally:
        torch.set_default_dtype(before)
    for name, tensor in model.state_dict().items():
        is_buffer = name.endswith(("lam", "running_mean", "running_var", "window"))
        expected = torch.float32 if is_buffer and dtype == torch.bfloat16 else dtype
        assert not tensor.is_floating_point() or tensor.dtype == expected, name
    x = torch.randn(4, 8, dtype=dtype)
    assert torch.equal(model(x), plain(x))
    assert model.to(dtype)[1].lam.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


def test_under_autocast_too_nothing_changes() -> None:
    model = FAMILIES["vit, class token"].build()
    plain = copy.deepcopy(model)
    convert_norms(model)
    (x,), _ = FAMILIES["vit, class token"].example()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))


def test_a_model_on_meta_is_converted_on_meta_and_comes_to_life_with_it() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    convert_norms(model)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    for module in model:
        module.reset_parameters()  # type: ignore[operator]
    x = torch.randn(4, 8)
    assert torch.equal(model(x), F.layer_norm(model[0](x), (8,)))


def test_what_was_frozen_stays_frozen() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False))
    model[0].requires_grad_(False)
    convert_norms(model)
    trains = [any("rep" in name and p.requires_grad for name, p in norm.named_parameters()) for norm in model]
    assert trains == [False, True, True]


class OwnBufferNorm(nn.Module):
    """A frozen gain, kept as a buffer."""

    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (8,), self.gain, 1e-6)


def test_a_norms_own_buffers_still_follow_the_models_precision() -> None:
    model = nn.Sequential(OwnBufferNorm())
    convert_norms(model)
    model.to(torch.bfloat16)
    assert (model[0].gain.dtype, model[0].lam.dtype) == (torch.bfloat16, torch.float32)
    model(torch.randn(4, 8, dtype=torch.bfloat16))


# --- compiled ---


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_a_converted_model_compiles_to_one_graph_and_lam_moves_without_another() -> None:
    torch._dynamo.reset()
    family = FAMILIES["vit, class token"]
    model = family.build()
    convert_norms(model)
    compiled = compile_one_graph(model, "aot_eager")
    (x,), _ = family.example()
    for lam in (1.0, 0.7, 0.3, 0.0):
        for module in model.modules():
            if isinstance(module, PRepBN):
                module.lam.fill_(lam)
        twin = copy.deepcopy(model)
        with torch.compiler.set_stance("default" if lam == 1 else "fail_on_recompile"):
            y = compiled(x)
        torch.testing.assert_close(y, twin(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_was_compiled_before_notices() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    compiled = compile_one_graph(model, "aot_eager")
    x = torch.randn(4, 8)
    y = compiled(x)
    assert convert_norms(compiled).converted == ["1"]
    assert torch.equal(compiled(x), y)
    model[1].lam.zero_()  # type: ignore[operator]
    rep = RepBN(8, init="norm")
    torch.testing.assert_close(compiled(x), rep(model[0](x)))
