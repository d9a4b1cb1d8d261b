"""What `find_norms` finds depends on what a module computes, not on torch's settings, names, or sizes that agree."""

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabnorm import (
    StabilityMonitor,
    StabNormError,
    convert_norms,
    find_norms,
    fold_norms,
    plan_fold,
    recalibrate_norms,
    register_norm,
)
from stabnorm.nn import PRepBN
from tests.torch_settings import default_dtype, deterministic


class T5LayerNorm(nn.Module):
    """Hugging Face's: casts to the dtype of its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


class WeightlessRMSNorm(nn.Module):
    """FalconMamba's: it is told one width and called with others."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class NanoChatRMSNorm(WeightlessRMSNorm):
    """It is told no width at all."""

    def __init__(self) -> None:
        super().__init__(0)


class OverTime(nn.Module):
    """Normalises each channel over time, whose axis is the second."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()


class SeriesNorm(OverTime):
    pass


class ScaledSeriesNorm(OverTime):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight


# --- torch's settings ---

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


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_s_settings_change_nothing_of_what_is_found_and_converted(setting: str, dtype: torch.dtype) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), T5LayerNorm(8), NanoChatRMSNorm(), nn.LayerNorm(8)).to(dtype)

    model, plain = build(), build()
    plain.load_state_dict(model.state_dict())
    expected = [(layer.name, layer.kind, layer.eps) for layer in find_norms(plain)]
    convert_norms(plain)
    with SETTINGS[setting]():
        before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert [(layer.name, layer.kind, layer.eps) for layer in find_norms(model)] == expected
        assert len(convert_norms(model).converted) == 3
        assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    for key, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
        assert model.state_dict()[key].dtype == tensor.dtype
    x = torch.randn(4, 8, dtype=dtype)
    y = model(x)
    assert torch.equal(y, plain(x))
    y.float().sum().backward()  # nothing was made in inference mode


# --- sizes ---


@pytest.mark.parametrize("width", [2, 3, 5, 7, 8, 16])
@pytest.mark.parametrize("norm", [SeriesNorm, ScaledSeriesNorm])
def test_a_norm_over_another_axis_is_no_layer_norm_whatever_its_width(norm: type[nn.Module], width: int) -> None:
    with pytest.warns(UserWarning, match=f"not understood.*\n.*{norm.__name__}"):
        assert find_norms(nn.Sequential(nn.Linear(width, width), norm(width))) == []


@pytest.mark.parametrize("build", [lambda: WeightlessRMSNorm(64), NanoChatRMSNorm])
@pytest.mark.parametrize("to", ["prepbn", "repbn", "unified", "power"])
@pytest.mark.parametrize("width", [2, 8, 64, 129])
def test_the_first_call_tells_the_width_where_nothing_else_does(
    build: Callable[[], nn.Module], to: str, width: int
) -> None:
    model: Any = nn.Sequential(nn.Linear(4, width), build(), nn.Linear(width, 3))
    plain = copy.deepcopy(model)
    (layer,) = find_norms(model)
    assert (layer.kind, layer.channel_dim, layer.any_width) == ("rms", -1, True)
    assert convert_norms(model, to).converted == ["1"]
    parameters = list(model.parameters())
    x = torch.randn(6, 4)
    y = model(x)
    if to == "prepbn":
        assert torch.equal(y, plain(x))
    y.sum().backward()
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]
    assert find_norms(model)[0].num_features == width
    fresh: Any = copy.deepcopy(plain)  # a checkpoint tells the width, too
    convert_norms(fresh, to)
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        if to == "prepbn":
            each[1].lam.zero_()
        each.eval()
    assert torch.equal(model(x), fresh(x))
    result = fold_norms(model, x)
    assert [norm.status for norm in result.norms] == ["forward"]


def test_a_norm_that_met_another_width_says_so() -> None:
    model: Any = nn.Sequential(WeightlessRMSNorm(64))
    convert_norms(model)
    model(torch.randn(3, 8))
    with pytest.raises(ValueError, match="num_features=8 on axis -1, but its input x has the shape"):
        model(torch.randn(3, 5))


def test_before_the_first_call_nothing_is_folded_or_measured() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 2), WeightlessRMSNorm(64), nn.Linear(2, 3))
    x = torch.randn(6, 4)
    assert [norm.status for norm in plan_fold(model, x).norms] == ["forward"]  # which runs the model first
    convert_norms(model)
    with pytest.raises(StabNormError, match="run a batch"):
        recalibrate_norms(model, [x], 1)
    model[1].lam.zero_()
    with pytest.warns(UserWarning, match="learns its number of channels from its first input: run a batch"):
        (norm,) = fold_norms(model.eval(), x).norms
    assert norm.status == "kept"


def test_the_modules_around_a_norm_let_expect_a_width() -> None:
    class Config:
        hidden_size = 32

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head_dim, self.q_norm, self.k_norm = 8, NanoChatRMSNorm(), NanoChatRMSNorm()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn, self.input_layernorm = Attention(), NanoChatRMSNorm()

    model: Any = nn.Sequential(Layer())
    model.config = Config()
    assert [layer.num_features for layer in find_norms(model)] == [8, 8, 32]


@pytest.mark.parametrize(
    "parts",
    [
        (nn.Linear(8, 16), nn.GELU(), NanoChatRMSNorm(), nn.Linear(16, 3)),
        (NanoChatRMSNorm(), nn.Linear(16, 3)),
        (nn.Embedding(5, 16), nn.ModuleList([NanoChatRMSNorm()]), nn.Linear(8, 3)),
        (nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1)), nn.Sequential(nn.Identity(), NanoChatRMSNorm())),
    ],
)
@pytest.mark.parametrize("preset", ["standard", "full"])
def test_the_layers_beside_a_norm_let_expect_a_width(parts: tuple[nn.Module, ...], preset: str) -> None:
    model = nn.Sequential(*copy.deepcopy(parts))
    (layer,) = find_norms(model)
    assert layer.num_features == 16
    with StabilityMonitor(model, preset, gradients=False) as monitor:
        layer.module(torch.randn(6, 16))
        monitor.step()
    assert monitor.history()["tokens"].item() == 6


@pytest.mark.parametrize("preset", ["economy", "standard", "full"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_norm_whose_width_nothing_tells_is_left_out_and_named(
    preset: str, alone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Identity(), NanoChatRMSNorm())
    caplog.set_level(logging.WARNING)
    if alone:
        with pytest.raises(ValueError, match="nothing to monitor"):
            StabilityMonitor(model, preset)
    else:
        both = nn.Sequential(nn.LayerNorm(8), nn.InstanceNorm1d(0), nn.Linear(8, 1))
        with StabilityMonitor(both, preset) as monitor, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that the width is not the one it was told
            for _ in range(2):
                both(torch.randn(4, 3, 8)).square().mean().backward()
                monitor.step()
        assert monitor.layers == ("0",)
        assert monitor.history()["tokens"].tolist() == [[12.0], [12.0]]
    assert caplog.text.count("nothing tells how many channels 1 normalises") == 1


def test_a_width_that_was_only_expected_is_called_that(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (4, 2)), NanoChatRMSNorm(), nn.Flatten(), nn.Linear(8, 1))
    with StabilityMonitor(model, "full") as monitor, caplog.at_level(logging.WARNING):
        model(torch.randn(6, 4)).square().mean().backward()
        monitor.step()
    assert "its input has 2 channels and the model around it lets expect 8" in caplog.text


# --- torch's other norms with a forward of their own ---


class GroupNorm32(nn.GroupNorm):
    """Of diffusion models: computes in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class FlatGroupNorm(nn.GroupNorm):
    """Channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class Instance32(nn.InstanceNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class Batch32(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class TokenBatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a batch norm by its class, and a ReLU by what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (GroupNorm32(4, 8, eps=1e-6), ("group", 1, 8, 4, 1e-6)),
        (GroupNorm32(1, 8), ("group", 1, 8, 1, 1e-5)),
        (Instance32(8, affine=True), ("instance", -3, 8, 8, 1e-5)),
        (Batch32(8), ("batch", 1, 8, 1, 1e-5)),
        (TokenBatchNorm(8), ("batch", -1, 8, 1, 1e-5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_norm_of_torch_s_with_a_forward_of_its_own_is_recognised(
    module: nn.Module, expected: tuple[str, int, int, int, float]
) -> None:
    (layer,) = find_norms(nn.Sequential(module))
    assert (layer.kind, layer.channel_dim, layer.num_features, layer.groups, layer.eps) == expected
    assert layer.gain_parameter is module.weight
    assert layer.bias_parameter is module.bias


class GroupNormAct(nn.GroupNorm):
    """timm's: it calls the function itself, and the activation writes into the norm's output."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(groups, channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))  # type: ignore[no-any-return]


class ActivatedInstance(nn.InstanceNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class Doubling(nn.BatchNorm2d):
    """It prepares its input, so the norm sees something else than the module."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x).relu()


class Raising(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("not on random input")


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (BatchNormAct2d(8), ("batch", 1, 8, 1)),
        (GroupNormAct(8, 4), ("group", 1, 8, 4)),
        (ActivatedInstance(8, affine=True), ("instance", -2, 8, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_norm_of_torch_s_that_goes_on_is_watched_and_what_it_returns_is_not_taken_for_the_norm_s(
    module: nn.Module, expected: tuple[str, int, int, int]
) -> None:
    (layer,) = find_norms(nn.Sequential(module))
    assert (layer.kind, layer.channel_dim, layer.num_features, layer.groups) == expected
    assert layer.goes_on
    x = torch.randn(4, 8, *(5,) * (-layer.channel_dim - 1 if expected[0] == "instance" else 2)) * 3 + 1
    with StabilityMonitor(module, ["token_std_mean", "outlier_dims", "grad_gain"]) as monitor:
        module(x).backward(torch.randn_like(x))
        monitor.step()
        module.requires_grad_(False)
        module(x.requires_grad_()).backward(torch.randn_like(x))
        monitor.step()
    history = monitor.history()
    expected_std = x.double().var(1, unbiased=False).sqrt().mean()
    torch.testing.assert_close(history["token_std_mean"][0, 0].double(), expected_std, rtol=1e-5, atol=0)
    assert history["outlier_dims"].isnan().all()
    gain = module.weight.grad
    assert isinstance(gain, Tensor)
    torch.testing.assert_close(history["grad_gain"][0, 0], gain.abs().mean() / x[:, 0].numel(), rtol=1e-5, atol=0)
    assert history["grad_gain"][1].isnan().all()  # only the output would tell, and that is the activation's


@pytest.mark.parametrize("module", [Doubling(8), Raising(8), FlatGroupNorm(4, 8)])
def test_one_that_prepares_its_input_or_does_not_run_is_named(module: nn.Module) -> None:
    with pytest.warns(UserWarning, match=f"not understood.*\n.*{type(module).__name__}"):
        assert find_norms(nn.Sequential(module)) == []


def test_a_class_is_registered_by_its_kind_alone() -> None:
    class OwnGroupNorm(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    class OwnInstanceNorm(nn.InstanceNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    class OwnNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.hidden_size, self.eps, self.weight = width, 1e-6, nn.Parameter(torch.ones(width))

    register_norm(OwnGroupNorm, "group")
    register_norm(OwnInstanceNorm, "instance")
    register_norm(OwnNorm, "rms")
    model: Any = nn.Sequential(OwnGroupNorm(4, 8), OwnInstanceNorm(8, affine=True), OwnNorm(8))
    layers = find_norms(model)
    assert [(x.kind, x.channel_dim, x.num_features, x.groups) for x in layers] == [
        ("group", 1, 8, 4), ("instance", -2, 8, 8), ("rms", -1, 8, 1)
    ]  # fmt: skip
    assert layers[2].bias is None


# --- names ---


class NoNorm(nn.Module):
    """MobileBERT's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Wav2Vec2NoLayerNormConvLayer(nn.Sequential):
    pass


class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class NormedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class ConvNormAct(nn.Sequential):
    """timm's, built without its norm: a convolution and an activation."""


class SpatialNorm(nn.Module):
    """A norm by its name, which computes something with a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:]) * self.conv(x)  # type: ignore[no-any-return]


class RMSNormalize(WeightlessRMSNorm):
    pass


def test_a_name_that_denies_a_norm_or_speaks_of_another_thing_is_no_alarm() -> None:
    model: Any = nn.Sequential(
        NoNorm(8), Wav2Vec2NoLayerNormConvLayer(nn.Conv1d(2, 2, 1)), Normalize(), NormedLinear(8, 8),
        ConvNormAct(nn.Conv2d(8, 8, 1), nn.Identity(), nn.ReLU()),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_norms(model) == []


class RMS(nn.Module):
    """A norm whose class does not say so, as small code bases have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("called", ["norm", "norm1", "q_norm", "ln", "ln_f", "post_ln", "LN", "norms"])
def test_a_norm_is_found_by_the_name_of_its_attribute(called: str) -> None:
    model = nn.Module()
    model.add_module(called, nn.ModuleList([RMS(8), Doubles()]) if called == "norms" else RMS(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (layer,) = find_norms(model)
    assert (layer.kind, layer.weight_name, layer.eps) == ("rms", "scale", 1e-6)


@pytest.mark.parametrize("called", ["linear", "final", "vulnerable", "denormalized", "scale"])
def test_other_attributes_are_not_run(called: str) -> None:
    model = nn.Module()
    model.add_module(called, RMS(8))
    assert find_norms(model) == []


def test_what_only_its_attribute_calls_a_norm_is_no_alarm() -> None:
    model = nn.Module()
    model.norm, model.norm2, model.ln_1 = Doubles(), nn.Linear(8, 8), nn.Sequential(Doubles(), nn.Dropout())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_norms(model) == []


def test_a_norm_by_its_name_that_holds_a_convolution_is_named() -> None:
    with pytest.warns(UserWarning, match="SpatialNorm"):
        assert find_norms(nn.Sequential(SpatialNorm())) == []


def test_layers_of_one_class_that_are_not_understood_are_told_in_one_line() -> None:
    model = nn.Sequential(*[nn.Sequential(SpatialNorm()) for _ in range(30)], Doubling(8))
    with pytest.warns(UserWarning, match="not understood") as warned:
        find_norms(model)
    lines = str(warned[0].message).splitlines()
    assert lines[1:3] == ["  0.0, 1.0, 2.0 and 27 more (SpatialNorm)", "  30 (Doubling)"]
    assert len(lines) == 4


def test_what_computes_a_norm_is_found_whatever_its_name_says() -> None:
    assert [layer.kind for layer in find_norms(nn.Sequential(RMSNormalize(8)))] == ["rms"]


def test_equal_modules_are_looked_at_once() -> None:
    calls: list[int] = []

    class SlowNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x).relu()

    def run(count: int) -> int:
        calls.clear()
        with pytest.warns(UserWarning, match="not understood"):
            find_norms(nn.Sequential(*(SlowNorm(8) for _ in range(count))))
        return len(calls)

    assert run(1) == run(20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NanoChat", "FalconMamba"])
def test_a_real_model_with_norms_without_weights_is_found_converted_and_trained(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    if name == "NanoChat":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = convert_norms(model)
        assert report.left == {}
        ids = torch.randint(0, 64, (2, 6))
        model(ids, labels=ids).loss.backward()
    assert all(module.rep.step >= 1 for module in model.modules() if isinstance(module, PRepBN))
