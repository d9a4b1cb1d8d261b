"""convert_norms: what is converted and what is left, with the reason; errors before anything is changed."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from stabnorm import StabNormError, convert_norms
from stabnorm.convert import NormConversion
from stabnorm.nn import PRepBN
from tests.families import FAMILIES


class LayerNormRelu(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class NormWithLam(nn.LayerNorm):
    lam = 0.5


def mixed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.RMSNorm(8))


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that conversion may change."""
    whole = [(name, type(module), id(module), sorted(vars(module))) for name, module in model.named_modules()]
    return whole + [(name, id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(all(torch.equal(*p) if isinstance(p[0], Tensor) else p[0] == p[1] for p in zip(*pair, strict=True))
               for pair in zip(one, other, strict=True))  # fmt: skip


# --- the report ---


def test_the_report_says_for_each_norm_what_was_done_or_why_not() -> None:
    report = convert_norms(mixed())
    assert report.converted == ["1", "4"]
    assert list(report.left) == ["2", "3"]
    assert report.norms[0] == NormConversion("1", True, "layer", "class PRepBNLayerNorm")
    assert str(report).splitlines() == [
        "2 of 4 norms converted to prepbn",
        "  1  layer  converted  class PRepBNLayerNorm",
        "  2  batch  left       it is batch norm, affine in eval already",
        "  3  group  left       it is group norm: only layer and rms norms are converted",
        "  4  rms    converted  class PRepBNRMSNorm",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.to = "power"  # type: ignore[misc]


@pytest.mark.parametrize("to", ["prepbn", "repbn", "unified", "power"])
def test_a_second_call_changes_nothing(to: Any) -> None:
    model = mixed()
    convert_norms(model, to)
    before = snapshot(model)
    report = convert_norms(model, to)
    assert same(snapshot(model), before)
    assert report.converted == []
    assert all(report.left[name].startswith("already converted") for name in ("1", "4"))
    convert_norms(model, "repbn")
    assert same(snapshot(model), before)


def test_what_is_added_later_is_converted_later() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    convert_norms(model)
    model.append(nn.LayerNorm(8))
    assert convert_norms(model).converted == ["1"]


def test_include_and_exclude_choose_and_the_rest_is_not_mentioned() -> None:
    model = FAMILIES["vit, class token"].build()
    report = convert_norms(model, include=["norm1", "^norm$"], exclude=r"blocks\.1")
    assert report.converted == ["blocks.0.norm1", "norm"]
    assert report.left == {}
    assert sum(isinstance(module, PRepBN) for module in model.modules()) == 2


def test_the_model_itself_may_be_the_norm_and_the_random_state_is_left_alone() -> None:
    norm, state = nn.LayerNorm(8), torch.get_rng_state()
    assert "(model)" in str(convert_norms(norm))
    assert isinstance(norm, PRepBN)
    assert torch.equal(torch.get_rng_state(), state)


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"to": "batchnorm"}, ValueError, "is unknown. Choose one of 'derf', 'dyt', 'power', 'prepbn', 'repbn'"),
        ({"window": 4}, TypeError, "to='prepbn' has no option 'window'. It takes center, eps, eval_mode, filtration"),
        ({"channel_dim": 1}, TypeError, "has no option 'channel_dim'"),
        ({"to": "repbn", "eval_mode": "rep"}, TypeError, "to='repbn' has no option 'eval_mode'. It takes center, eps"),
        ({"eval_mode": "running"}, ValueError, "1: eval_mode='running' is unknown"),
        ({"init": "speech"}, ValueError, "1: init='speech' is unknown"),
        ({"to": "power", "groups": 3}, ValueError, "1: groups=3 does not divide num_features=8"),
        ({"include": "block"}, ValueError, "include='block' matches none of the 4 norms of Sequential: '1', '2', '3'"),
        ({"exclude": ["1", "head"]}, ValueError, "exclude='head' matches none of the 4 norms"),
        ({"include": "("}, ValueError, r"include='\(' is not a valid regular expression"),
        ({"exclude": "."}, StabNormError, "Sequential has no norm to convert. What there is:\n  4 norms, none of them"),
        ({"include": "2|3"}, StabNormError, "\n  2  batch  left  it is batch norm, affine in eval already\n  3  group"),
    ],
)
def test_an_error_says_what_was_wrong_and_changes_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = mixed()
    before = snapshot(model)
    with pytest.raises(error, match=message.replace(".", r"\.").replace("\\\\", "\\")):
        convert_norms(model, **arguments)
    assert same(snapshot(model), before)


def test_an_option_that_only_a_later_layer_cannot_take_changes_no_earlier_one() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(9))
    before = snapshot(model)
    with pytest.raises(ValueError, match="1: groups=2 does not divide num_features=9"):
        convert_norms(model, "power", groups=2)
    assert same(snapshot(model), before)


def test_a_model_without_norms_is_an_error() -> None:
    with pytest.raises(StabNormError, match=r"Linear has no norm to convert[\s\S]*0 norms"):
        convert_norms(nn.Linear(2, 2))


def test_a_model_that_is_wrapped_for_several_processes_is_an_error() -> None:
    # Not by its constructor: a process group that is torn down in the tests' own process can hang it.
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = mixed()
    model = nn.ModuleDict({"net": wrapped})
    with pytest.raises(StabNormError, match="net is wrapped in DistributedDataParallel already"):
        convert_norms(model)


# --- what is left, and why ---


def _parametrized() -> nn.Module:
    norm = nn.LayerNorm(8)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


def _pruned() -> nn.Module:
    norm = nn.LayerNorm(8)
    prune.random_unstructured(norm, "weight", 2)
    return norm


def _patched() -> nn.Module:
    norm = nn.LayerNorm(8)
    norm.forward = lambda input: input  # type: ignore[method-assign]
    return norm


LEFT = {
    "parametrized": (_parametrized, "its parameters are parametrized"),
    "pruned": (_pruned, "its weight is computed from other tensors"),
    "patched": (_patched, "its forward was replaced on the object"),
    "clash": (lambda: NormWithLam(8), "its class has an attribute 'lam' of its own"),
    "scripted": (lambda: torch.jit.script(nn.LayerNorm(8)), "it is compiled by torch.jit"),
    "not a norm": (lambda: LayerNormRelu(8), "what LayerNormRelu computes is not known: tell stabnorm.register_norm"),
    "instance": (lambda: nn.InstanceNorm1d(8), "it is instance norm: only layer and rms norms"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", LEFT)
def test_a_norm_that_cannot_be_converted_is_left_whole_with_the_reason(case: str) -> None:
    build, reason = LEFT[case]
    model = nn.ModuleDict({"good": nn.LayerNorm(8), "odd": build()})
    before = snapshot(model["odd"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="These l")  # what find_norms says of the last ones
        report = convert_norms(model)
    assert report.converted == ["good"]
    assert report.left["odd"].startswith(reason)
    assert same(snapshot(model["odd"]), before)


def test_what_is_not_understood_is_also_warned_of_unless_excluded() -> None:
    model = nn.Sequential(nn.LayerNorm(8), LayerNormRelu(8))
    with pytest.warns(UserWarning, match=r"1 \(LayerNormRelu\)"):
        convert_norms(model)
    convert_norms(model, exclude="1")


def test_where_warnings_are_errors_that_one_changes_nothing() -> None:
    model = nn.Sequential(nn.LayerNorm(8), LayerNormRelu(8))
    before = snapshot(model)
    with pytest.raises(UserWarning, match="LayerNormRelu"):  # an error throughout these tests
        convert_norms(model)
    assert same(snapshot(model), before)


def test_a_lazy_norm_is_left_too() -> None:
    with pytest.warns(UserWarning, match="do not know their size yet"):
        report = convert_norms(nn.Sequential(nn.LayerNorm(8), nn.LazyBatchNorm1d()))
    assert report.left == {"1": "it does not know its size yet: run one batch first"}


def test_a_norm_whose_parameter_another_module_holds_is_left() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8), nn.PReLU(8))
    model[1].weight = model[0].weight
    model[2].bias = nn.Parameter(torch.zeros(8))
    model[3].weight = model[2].bias
    with pytest.raises(StabNormError, match="no norm to convert") as error:
        convert_norms(model)
    assert "0  layer  left  its weight is also 1.weight: give it parameters of its own" in str(error.value)
    assert "2  layer  left  its bias is also 3.weight" in str(error.value)
