"""Other libraries' norms are known by what they compute; what merely looks like a norm is named, never listed."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabnorm import find_norms
from stabnorm.norms import NormLayer

# --- look-alikes of other libraries' norms ---


class LlamaRMSNorm(nn.Module):
    """Hugging Face: computes in fp32, whatever it gets."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.float()
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)


class T5LayerNorm(LlamaRMSNorm):
    """Hugging Face: called a layer norm, computes an rms norm, and casts to the weight's dtype."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class GemmaRMSNorm(nn.Module):
    """Hugging Face: multiplies by 1 + weight."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        output = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (output * (1.0 + self.weight.float())).type_as(x)


class LayerNorm2d(nn.LayerNorm):
    """timm: layer norm over the channels of an image."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class LayerNormAct2d(nn.LayerNorm):
    """timm: a LayerNorm by its class, and a ReLU by what it does."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        x = F.layer_norm(input.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return self.act(self.drop(x.permute(0, 3, 1, 2)))  # type: ignore[no-any-return]


class ChanLayerNorm(nn.Module):
    """lucidrains: names and shapes of its own, and eps nowhere to be read."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        return (x - mean) * (variance + 1e-5).rsqrt() * self.g + self.b


class OlmoLayerNorm(nn.Module):
    """Hugging Face: no weights at all, and eps written into the call."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.normalized_shape = (hidden_size,)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.layer_norm(hidden_states.float(), self.normalized_shape, None, None, eps=1e-5).to(hidden_states.dtype)


# --- norms whose output depends on more than the input's layer or rms norm ---


class GatedNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        normalized = super().forward(hidden_states)
        return normalized if gate is None else normalized * F.silu(gate)


class BlendedNorm(nn.LayerNorm):
    """Looks like a layer norm as long as its buffer is at its start."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.lam = nn.Buffer(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, super().forward(x), self.lam)


class NoisyNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn_like(x)


class BatchwideNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class StdNorm(nn.LayerNorm):
    """The Annotated Transformer: eps is added to the unbiased standard deviation, not to the variance."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.bias


class ScaleNorm(nn.Module):
    """A norm with one gain for all channels, so that the number of channels is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.g


class AxisNorm(nn.Module):
    """Its `dim` is an axis, not a width."""

    dim = 2

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(self.dim, keepdim=True) + 1e-6).rsqrt()


class RaisingNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("needs a kernel that is not here")


class UncopyableNorm(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.stream = io.BytesIO().getbuffer()  # a memoryview can be neither copied nor pickled

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class AdaNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_gain = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.to_gain(x.mean(1, keepdim=True))  # type: ignore[no-any-return]


# --- helpers ---


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def only(model: nn.Module) -> NormLayer:
    (layer,) = find_norms(model)
    return layer


def described(layer: NormLayer) -> tuple[str, int, int, float, int, int]:
    return layer.kind, layer.channel_dim, layer.num_features, layer.eps, layer.groups, layer.feature_dims


# --- known by what it computes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("module", "expected", "offset"),
    [
        (LlamaRMSNorm(8, eps=1e-5), ("rms", -1, 8, 1e-5, 1, 1), 0),
        (LlamaRMSNorm(4096), ("rms", -1, 4096, 1e-6, 1, 1), 0),
        (T5LayerNorm(8), ("rms", -1, 8, 1e-6, 1, 1), 0),
        (GemmaRMSNorm(8), ("rms", -1, 8, 1e-6, 1, 1), 1),
        (LayerNorm2d(8, eps=1e-6), ("layer", 1, 8, 1e-6, 1, 1), 0),
        (LayerNorm2d(4, bias=False), ("layer", 1, 4, 1e-5, 1, 1), 0),
        (LayerNorm2d(2, elementwise_affine=False), ("layer", 1, 2, 1e-5, 1, 1), 0),
        (ChanLayerNorm(8), ("layer", 1, 8, 1e-5, 1, 1), 0),
        (OlmoLayerNorm(8), ("layer", -1, 8, 1e-5, 1, 1), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_other_libraries_norms_are_known_by_what_they_compute(
    module: nn.Module, expected: tuple[str, int, int, float, int, int], offset: int, dtype: torch.dtype
) -> None:
    for candidate in (module, randomised(copy.deepcopy(module))):  # as built, all ones or zeros, and trained
        layer = only(candidate.to(dtype))
        assert described(layer) == expected
        assert layer.gain_offset == offset


def test_the_gain_of_an_unusual_shape_has_one_entry_per_channel() -> None:
    module = ChanLayerNorm(8)
    layer = only(module)
    assert layer.gain_parameter is module.g
    assert layer.bias_parameter is module.b
    assert layer.gain is not None
    assert layer.gain.shape == (8,)


def test_a_norm_on_the_meta_device_is_understood() -> None:
    with torch.device("meta"):
        assert only(GemmaRMSNorm(8)).gain_offset == 1


@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1.1920929e-07, 1e-7, 1e-6, 1e-5, 1e-3])
def test_eps_is_read_off_the_output_where_no_attribute_tells(eps: float) -> None:
    class QuietNorm(OlmoLayerNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return F.layer_norm(hidden_states, self.normalized_shape, eps=eps)

    assert only(QuietNorm(8)).eps == pytest.approx(eps)


def test_eps_is_the_one_computed_with_when_the_attribute_says_otherwise() -> None:
    class ForgetfulNorm(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias)  # the default, 1e-5

    assert only(ForgetfulNorm(8, eps=1e-6)).eps == 1e-5


@pytest.mark.parametrize(
    "module",
    [
        LayerNormAct2d(8),
        GatedNorm(8),
        BlendedNorm(8),
        NoisyNorm(8),
        BatchwideNorm(8),
        StdNorm(8),
        ScaleNorm(),
        AxisNorm(),
        RaisingNorm(),
        UncopyableNorm(8),
        AdaNorm(8),
        nn.LocalResponseNorm(2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_norm_that_is_not_understood_is_named_and_not_listed(module: nn.Module) -> None:
    with pytest.warns(UserWarning, match=rf"not understood.*\n  1 \({type(module).__name__}\)\n.*register_norm"):
        assert find_norms(nn.Sequential(nn.Linear(8, 8), module)) == []


def test_a_forward_put_on_the_object_is_not_run() -> None:
    norm = LlamaRMSNorm(8)
    calls: list[Tensor] = []
    norm.forward = calls.append  # type: ignore[assignment,method-assign]
    with pytest.warns(UserWarning, match="not understood"):
        assert find_norms(norm) == []
    assert calls == []


# --- looking changes nothing ---


def test_the_random_state_is_untouched() -> None:
    model = nn.Sequential(NoisyNorm(8), LlamaRMSNorm(8))
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="NoisyNorm"):
        find_norms(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_users_module_is_neither_run_nor_changed() -> None:
    class CountingNorm(GemmaRMSNorm):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.calls = nn.Buffer(torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x)

    model = nn.Sequential(randomised(CountingNorm(8)), nn.BatchNorm1d(8)).train()
    fired: list[str] = []
    model[0].register_forward_hook(lambda *_: fired.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: fired.append("pre"))
    tensors, state = dict(model.state_dict(keep_vars=True)), copy.deepcopy(model.state_dict())

    assert [layer.name for layer in find_norms(model)] == ["0", "1"]
    assert fired == []
    assert all(module.training for module in model.modules())
    assert len(model[0]._forward_hooks) == len(model[0]._forward_pre_hooks) == 1
    assert all(tensor is tensors[key] for key, tensor in model.state_dict(keep_vars=True).items())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.randn(4, 8))
    assert fired == ["pre", "forward"]


def test_hooks_are_not_copied() -> None:
    class Owner:
        def __deepcopy__(self, memo: object) -> "Owner":
            raise AssertionError("copied what a hook belongs to")

        def hook(self, *_: object) -> None: ...

    norm = LlamaRMSNorm(8)
    norm.register_forward_hook(Owner().hook)
    assert only(norm).kind == "rms"
