"""Norms are found once, in order, with the right axis, eps and gain, by type or as registered."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import stabnorm.norms
from stabnorm import find_norms, register_norm
from stabnorm.norms import NormLayer
from stabnorm.norms import registry as classes

# --- norms of the user's own ---


class PlusOneNorm(nn.RMSNorm):
    """A norm that can only be recognised by its output: torch's, with another gain."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class RaisingNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("needs a kernel that is not here")


class ReluNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class PreNorm(nn.Module):
    """lucidrains: a wrapper that holds a norm and is none."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))  # type: ignore[no-any-return]


# --- helpers ---


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "_REGISTERED", dict(classes._REGISTERED))


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def only(model: nn.Module) -> NormLayer:
    (layer,) = find_norms(model)
    return layer


def names(model: nn.Module, **filters: str | list[str] | None) -> list[str]:
    return [layer.name for layer in find_norms(model, **filters)]


def compiled(module: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(module, backend="eager"))


def described(layer: NormLayer) -> tuple[str, int, int, float, int, int]:
    return layer.kind, layer.channel_dim, layer.num_features, layer.eps, layer.groups, layer.feature_dims


# --- known by type ---

FLOAT_EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(8), ("layer", -1, 8, 1e-5, 1, 1)),
        (nn.LayerNorm((4, 8), eps=1e-3), ("layer", -1, 32, 1e-3, 1, 2)),
        (nn.LayerNorm(8, elementwise_affine=False), ("layer", -1, 8, 1e-5, 1, 1)),
        (nn.RMSNorm(8, eps=1e-6), ("rms", -1, 8, 1e-6, 1, 1)),
        (nn.RMSNorm((2, 8)), ("rms", -1, 16, FLOAT_EPS, 1, 2)),
        (nn.RMSNorm(8, elementwise_affine=False), ("rms", -1, 8, FLOAT_EPS, 1, 1)),
        (nn.RMSNorm(8, dtype=torch.bfloat16), ("rms", -1, 8, torch.finfo(torch.bfloat16).eps, 1, 1)),
        (nn.BatchNorm1d(8), ("batch", 1, 8, 1e-5, 1, 1)),
        (nn.BatchNorm2d(8, eps=1e-3), ("batch", 1, 8, 1e-3, 1, 1)),
        (nn.BatchNorm3d(8, affine=False), ("batch", 1, 8, 1e-5, 1, 1)),
        (nn.SyncBatchNorm(8), ("batch", 1, 8, 1e-5, 1, 1)),
        (nn.GroupNorm(2, 8), ("group", 1, 8, 1e-5, 2, 1)),
        (nn.InstanceNorm1d(8), ("instance", -2, 8, 1e-5, 8, 1)),
        (nn.InstanceNorm2d(8, affine=True), ("instance", -3, 8, 1e-5, 8, 1)),
        (nn.InstanceNorm3d(8, track_running_stats=True), ("instance", -4, 8, 1e-5, 8, 1)),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_torch_norms_are_described_by_their_attributes(
    module: nn.Module, expected: tuple[str, int, int, float, int, int]
) -> None:
    assert described(only(nn.Sequential(nn.Identity(), module))) == expected


def test_a_subclass_that_keeps_forward_is_known_by_type() -> None:
    class Fancy(nn.GroupNorm):
        pass

    assert only(Fancy(4, 8)).groups == 4


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm1d(), nn.LazyInstanceNorm2d(), nn.LazyBatchNorm2d(affine=False)])
def test_a_lazy_norm_asks_for_one_batch_first(lazy: nn.Module) -> None:
    model = nn.Sequential(lazy)
    with pytest.warns(UserWarning, match=rf"Run one batch first:\n  0 \({type(lazy).__name__}\)"):
        assert find_norms(model) == []


def test_a_lazy_norm_is_found_once_it_has_seen_a_batch() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d())
    model(torch.randn(4, 6))
    assert only(model).num_features == 6


def test_running_statistics_are_none_unless_tracked() -> None:
    tracking, free = find_norms(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)))
    assert tracking.running_mean is not None
    assert tracking.running_var is not None
    assert free.running_mean is None
    assert free.running_var is None


def test_one_warning_names_all_layers_that_are_not_understood() -> None:
    model = nn.Sequential(ReluNorm(8), nn.LayerNorm(8), RaisingNorm(), nn.LazyBatchNorm1d())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert names(model) == ["1"]
    (warning,) = caught
    assert all(f"  {layer}\n" in f"{warning.message}\n" for layer in ("0 (ReluNorm)", "2 (RaisingNorm)"))
    assert "  3 (LazyBatchNorm1d)" in str(warning.message)
    assert warning.filename == __file__


def test_weight_norm_and_spectral_norm_are_no_norm_layers() -> None:
    model = nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    )
    assert find_norms(model) == []


def test_a_model_without_norms_gives_an_empty_list() -> None:
    assert find_norms(nn.Linear(4, 4)) == []


def test_the_model_still_copies_and_pickles_and_so_do_its_layers() -> None:
    model = nn.Sequential(randomised(PlusOneNorm(8)), nn.LayerNorm(8))
    layers = find_norms(model)
    x = torch.randn(2, 3, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    assert described(pickle.loads(pickle.dumps(layers[0]))) == described(layers[0])


# --- names and order ---


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.mix, self.norm2 = PlusOneNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.mix(self.norm1(x)))  # type: ignore[no-any-return]


BLOCKS = ["0.norm1", "0.norm2", "1.norm1", "1.norm2"]


def test_layers_come_in_module_order() -> None:
    assert names(nn.Sequential(Block(), Block())) == BLOCKS


def test_wrappers_do_not_show_in_names() -> None:
    blocks = nn.Sequential(compiled(Block()), checkpoint_wrapper(Block()))
    assert names(compiled(blocks)) == BLOCKS
    assert names(compiled(nn.LayerNorm(8))) == [""]


def test_a_wrapper_around_a_norm_is_not_the_norm() -> None:
    assert names(nn.Sequential(PreNorm(8, nn.Linear(8, 8)))) == ["0.norm"]


def test_a_wrapper_around_a_norm_that_is_not_understood_is_not_named_itself() -> None:
    class PreCustomNorm(nn.Sequential):
        pass

    with pytest.warns(UserWarning, match=r"left out:\n  0 \(RaisingNorm\)\nWhere"):
        find_norms(PreCustomNorm(RaisingNorm()))


def test_a_shared_module_is_listed_once_under_its_first_name() -> None:
    shared = PlusOneNorm(8)
    assert names(nn.ModuleDict({"a": nn.Sequential(shared), "b": shared, "c": nn.Sequential(shared)})) == ["a.0"]


def test_what_stands_where_a_norm_was_is_no_norm() -> None:
    class FoldedNorm(nn.Identity):
        pass

    assert find_norms(FoldedNorm()) == []


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (r"norm1$", None, ["0.norm1", "1.norm1"]),
        (None, r"^0\.", ["1.norm1", "1.norm2"]),
        ([r"^0", r"norm2"], r"^1", ["0.norm1", "0.norm2"]),
        ([], None, []),
    ],
)
def test_include_and_exclude_search_the_name(
    include: str | list[str] | None, exclude: str | list[str] | None, expected: list[str]
) -> None:
    assert names(nn.Sequential(Block(), Block()), include=include, exclude=exclude) == expected


def test_an_excluded_layer_is_not_complained_about() -> None:
    assert find_norms(nn.Sequential(RaisingNorm(), nn.LazyBatchNorm1d()), exclude=["^0$", "^1$"]) == []


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_an_invalid_regular_expression_says_so(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument}='\*norm' is not a valid regular expression: nothing to repeat"):
        names(nn.LayerNorm(8), **{argument: ["fine", "*norm"]})


# --- what a layer reads ---


@pytest.mark.parametrize(("module", "offset"), [(nn.LayerNorm(8), 0), (PlusOneNorm(8), 1)])
def test_the_gain_is_what_multiplies_and_follows_a_replaced_parameter(
    module: nn.LayerNorm | nn.RMSNorm, offset: int
) -> None:
    layer = only(module)
    module.weight = nn.Parameter(torch.randn(8))
    assert layer.gain_parameter is module.weight
    torch.testing.assert_close(layer.gain, module.weight + offset)


def test_the_bias_and_the_running_statistics_follow_their_module() -> None:
    module = nn.BatchNorm1d(4)
    layer = only(module)
    module.bias = nn.Parameter(torch.randn(4))
    module.running_mean = torch.randn(4)
    module(torch.randn(16, 4))
    assert layer.bias_parameter is module.bias
    assert layer.bias is module.bias
    assert layer.running_mean is module.running_mean
    assert layer.running_var is module.running_var


def test_a_norm_without_weights_has_neither_gain_nor_bias() -> None:
    for module in (nn.LayerNorm(8, elementwise_affine=False), nn.BatchNorm1d(8, affine=False), nn.InstanceNorm1d(8)):
        layer = only(module)
        assert (layer.gain, layer.gain_parameter, layer.bias, layer.bias_parameter) == (None,) * 4


@pytest.mark.parametrize("trailing", [(8,), (4, 8)])
def test_gain_and_bias_have_one_entry_per_channel(trailing: tuple[int, ...]) -> None:
    layer = only(randomised(nn.LayerNorm(trailing)))
    assert layer.gain is not None
    assert layer.bias is not None
    assert layer.gain.shape == layer.bias.shape == (layer.num_features,)


# --- known by registration ---


class Custom(nn.Module):
    def __init__(self, width: int | tuple[int, ...]) -> None:
        super().__init__()
        self.width, self.axis, self.num_groups = width, 1, 2
        self.scale = nn.Parameter(torch.ones(width))
        self.inner = nn.LayerNorm(width)


@pytest.fixture
def custom_registered(registry: None) -> Callable[..., None]:
    def register(kind: stabnorm.norms.Kind = "rms", cls: type[nn.Module] = Custom, **given: object) -> None:
        options = {"num_features": "width", "eps": 1e-6, "weight": "scale", "bias": None} | given
        register_norm(cls, kind, **options)  # type: ignore[arg-type]

    return register


def test_a_registered_class_is_read_by_its_attributes_and_listed_once(custom_registered: Callable[..., None]) -> None:
    custom_registered(gain_offset=1.0, channel_dim="axis")
    module = Custom(8)
    layer = only(nn.Sequential(module))  # its inner norm is its own business
    assert (layer.name, *described(layer)) == ("0", "rms", 1, 8, 1e-6, 1, 1)
    assert layer.gain_parameter is module.scale
    torch.testing.assert_close(layer.gain, module.scale + 1)
    assert layer.bias is None


@pytest.mark.parametrize(
    ("kind", "width", "given", "expected"),
    [
        ("layer", (4, 8), {}, ("layer", -1, 32, 1e-6, 1, 2)),
        ("group", 8, {"channel_dim": 1}, ("group", 1, 8, 1e-6, 2, 1)),
        ("instance", 8, {"channel_dim": 1}, ("instance", 1, 8, 1e-6, 8, 1)),
        ("rms", 8, {"num_features": 8, "eps": None}, ("rms", -1, 8, FLOAT_EPS, 1, 1)),
    ],
)
def test_registered_kinds_count_groups_and_trailing_dims(
    custom_registered: Callable[..., None],
    kind: str,
    width: int | tuple[int, ...],
    given: dict[str, object],
    expected: tuple[str, int, int, float, int, int],
) -> None:
    custom_registered(kind, **given)
    assert described(only(Custom(width))) == expected


def test_registration_wins_over_type_and_behaviour(registry: None) -> None:
    register_norm(ReluNorm, "layer", channel_dim=1, num_features="normalized_shape")
    register_norm(nn.LayerNorm, "layer", num_features="normalized_shape", eps=0.5)
    acting, plain = find_norms(nn.Sequential(ReluNorm(8), nn.LayerNorm(8)))
    assert (acting.channel_dim, acting.eps) == (1, 1e-5)
    assert plain.eps == 0.5


def test_the_most_derived_registration_counts(custom_registered: Callable[..., None]) -> None:
    class Derived(Custom):
        pass

    class MoreDerived(Derived):
        pass

    custom_registered("layer", cls=Derived)
    custom_registered("rms")
    assert only(MoreDerived(8)).kind == "layer"
    assert only(Custom(8)).kind == "rms"


@pytest.mark.parametrize("argument", ["num_features", "eps", "weight", "bias", "channel_dim"])
def test_a_missing_attribute_is_named_with_its_class_and_layer(
    custom_registered: Callable[..., None], argument: str
) -> None:
    custom_registered(**{argument: "nowhere"})
    message = rf"Custom was registered .* {argument}='nowhere', but layer '0' has no attribute 'nowhere'.*register_norm"
    with pytest.raises(ValueError, match=message):
        find_norms(nn.Sequential(Custom(8)))


def test_register_norm_checks_its_arguments(registry: None) -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Module class, not Linear\(.*Pass the class"):
        register_norm(nn.Linear(2, 2), "rms")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not <class 'int'>"):
        register_norm(int, "rms")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kind='weight' is unknown\. Choose one of 'layer', 'rms', 'batch'"):
        register_norm(Custom, "weight")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="channel_dim=0 is the batch"):
        register_norm(Custom, "rms", channel_dim=0)
