"""Other tools read what stands in a folded norm's place as they read the norm: tracers, quantisers, and model code."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import convert_norms, fold_norms
from stabnorm.fold import FoldedNorm, FrozenAffine
from stabnorm.nn import PRepBN, RepBN
from tests.families import randomize_
from tests.fold.nets import relative_error

# TorchScript is deprecated from torch 2.14 on, FX quantisation has moved to another package: they warn.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)


def script(model: nn.Module, *example: Tensor) -> nn.Module:
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(model), saved)
    saved.seek(0)
    return torch.jit.load(saved)  # type: ignore[no-any-return]


def trace_by_fx(model: nn.Module, *example: Tensor) -> nn.Module:
    return torch.fx.symbolic_trace(model)


def trace_by_jit(model: nn.Module, *example: Tensor) -> nn.Module:
    return torch.jit.trace(model, example)  # type: ignore[no-untyped-call, no-any-return]  # it compares two traces


def export(model: nn.Module, *example: Tensor) -> nn.Module:
    torch._dynamo.reset()  # else torch 2.6 counts all models of this file as recompilations of one
    return torch.export.export(model, example).module()


def compile_whole(model: nn.Module, *example: Tensor) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")  # type: ignore[return-value]


def quantise_by_fx(model: nn.Module, *example: Tensor) -> nn.Module:
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import QConfigMapping

    return fx.prepare_fx(model, QConfigMapping(), example)  # type: ignore[no-any-return]


TOOLS = [script, trace_by_fx, trace_by_jit, export, compile_whole, quantise_by_fx]
every_tool = pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)


def drawn(model: Any) -> Any:
    """In eval, at lam = 0, with parameters and statistics that are no first values."""
    randomize_(model, 0).eval()
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.lam.zero_()
    return model


def folded(model: Any, example: Any, *statuses: str) -> Any:
    result = fold_norms(drawn(model), example)
    assert [norm.status for norm in result.norms] == list(statuses)
    return result.model


# --- tools that trace, script and export ---


@every_tool
def test_a_model_with_folded_norms_goes_through_the_tools_that_take_the_plain_one(
    tool: Callable[..., nn.Module],
) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))
    convert_norms(model)
    x = torch.randn(3, 4)
    model = folded(model, x, "forward")
    with torch.no_grad():
        assert torch.equal(tool(model, x)(x), model(x))


@every_tool
@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 5, 4)], ids=str)
def test_an_affine_that_is_left_goes_through_the_tools(tool: Callable[..., nn.Module], shape: tuple[int, ...]) -> None:
    batch_norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    x = torch.randn(shape)
    model = folded(nn.Sequential(nn.ReLU(), batch_norm(8), nn.ReLU()), x, "affine")
    with torch.no_grad():
        assert torch.equal(tool(model, x)(x), model(x))


class LlamaRMSNorm(nn.Module):
    """Hugging Face's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + 1e-6)


class LayerNorm2d(nn.LayerNorm):
    """timm's."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


@every_tool
@pytest.mark.parametrize("to", ["prepbn", "repbn", "unified", "power"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, LlamaRMSNorm, LayerNorm2d])
def test_a_converted_model_goes_through_the_tools_that_take_the_plain_one(
    tool: Callable[..., nn.Module], to: str, norm: type[nn.Module]
) -> None:
    first = nn.Conv2d(4, 8, 1) if norm is LayerNorm2d else nn.Linear(4, 8)
    model: Any = nn.Sequential(first, norm(8), nn.ReLU())
    convert_norms(model, to)
    drawn(model)
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.lam.fill_(0.3)
    x = torch.randn(2, 4, 3, 3) if norm is LayerNorm2d else torch.randn(3, 4)
    with torch.no_grad():
        assert torch.allclose(tool(model, x)(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_converted_model_that_torch_fx_traced_still_trains() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    convert_norms(model)
    traced = torch.fx.symbolic_trace(model)
    traced(torch.randn(3, 4)).sum().backward()
    norm = traced.get_submodule("1")
    assert isinstance(norm, PRepBN)
    assert norm.rep.step == 1


def test_a_scripted_norm_in_training_mode_says_that_it_cannot_train() -> None:
    with pytest.raises(torch.jit.Error, match=r"call eval\(\)"):
        torch.jit.script(RepBN(8))(torch.randn(3, 8))


def test_a_tracer_passes_a_stand_in_that_is_called_by_keyword_or_with_a_mask() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.fc = RepBN(8), RepBN(8), nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.fc(self.second(self.fc(self.first(x, mask)), mask=mask))  # type: ignore[no-any-return]

    model: Any = drawn(Block())
    model.first = FoldedNorm().in_place_of(model.first)
    model.second = FrozenAffine(torch.rand(8), torch.rand(8)).in_place_of(model.second)
    x, mask = torch.randn(3, 8), torch.ones(3, dtype=torch.bool)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x, mask), model(x, mask))


# --- code that reads a norm's attributes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [nn.LayerNorm(8, eps=1e-6), nn.RMSNorm(8), nn.LayerNorm(8, elementwise_affine=False)])
def test_a_stand_in_answers_as_the_norm_did(norm: nn.Module, dtype: torch.dtype) -> None:
    norm = norm.to(dtype)
    for stand_in in (FoldedNorm(), FrozenAffine(torch.ones(8), torch.zeros(8))):
        stand_in.in_place_of(norm)
        assert stand_in.eps == norm.eps
        assert stand_in.normalized_shape == norm.normalized_shape
        for name, tensor in norm._parameters.items():
            answer = getattr(stand_in, name)
            assert answer is None if tensor is None else (answer.dtype, answer.device) == (tensor.dtype, tensor.device)
        assert list(stand_in.parameters()) == []
        assert set(stand_in.state_dict()) <= {"scale", "shift"}


def test_a_model_that_casts_to_the_dtype_of_its_norm_folds() -> None:
    class MambaBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mixer = nn.RMSNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mixer(self.norm(x.to(dtype=self.norm.weight.dtype)))  # type: ignore[no-any-return]

    model: Any = nn.Sequential(MambaBlock(), MambaBlock())
    convert_norms(model)
    x = torch.randn(2, 3, 8)
    model = folded(model, x, "forward", "forward")
    assert model(x).dtype == torch.float32
    assert model.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16  # the answer moves with the model


def test_a_model_that_takes_its_width_from_its_norm_folds() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = RepBN(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(x.reshape(-1, self.norm.weight.shape[0])))  # type: ignore[no-any-return]

    model: Any = Heads()
    x = torch.randn(3, 16)
    assert folded(model, x, "forward")(x).shape == (6, 8)


def test_merging_a_batch_norm_that_is_folded_already_changes_nothing() -> None:
    def merged(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
        """What timm's `reparameterize` and its like compute."""
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias = torch.zeros(8) if conv.bias is None else conv.bias
        return conv.weight * scale.view(-1, 1, 1, 1), norm.bias + scale * (bias - norm.running_mean)

    x = torch.randn(2, 3, 6, 6)
    model = folded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()), x, "backward")
    weight, bias = merged(model[0], model[1])
    assert torch.allclose(nn.functional.conv2d(x, weight, bias), model[:2](x), atol=1e-6)


def test_an_operation_on_the_weight_of_a_norm_that_is_gone_is_an_error() -> None:
    stand_in: Any = FoldedNorm().in_place_of(nn.LayerNorm(8))
    with pytest.raises(RuntimeError):
        nn.functional.layer_norm(torch.randn(3, 8), stand_in.normalized_shape, stand_in.weight, stand_in.bias)


@pytest.mark.slow
def test_a_swin_transformer_takes_another_input_size_after_the_fold() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, depths=(2, 2), embed_dim=16, num_heads=(1, 2), window_size=4
    )
    convert_norms(model)
    result = fold_norms(drawn(model), torch.randn(2, 3, 32, 32))
    each: Any
    for each in (model, result.model):
        each.set_input_size((64, 64))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(result.model.double()(x.double()), model.double()(x.double())) < 1e-4
