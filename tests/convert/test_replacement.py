"""RepBN, UnifiedNorm and PowerNorm in the norm's place: what is kept of it, and what the model then computes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabNormError, convert_norms, find_norms
from stabnorm.convert import Target
from stabnorm.nn import PowerNorm, RepBN, UnifiedNorm
from tests.families import EVERY_FAMILY, Family, randomize_
from tests.families.convolutional import LayerNorm2d
from tests.families.decoders import GemmaRMSNorm

TARGETS: dict[Target, type[nn.Module]] = {"repbn": RepBN, "unified": UnifiedNorm, "power": PowerNorm}
targets = pytest.mark.parametrize("to", TARGETS)


@pytest.mark.parametrize("family", EVERY_FAMILY)
@targets
def test_every_family_runs_on_them_and_each_is_affine_in_eval(family: Family, to: Target) -> None:
    model = randomize_(family.build(), seed=1)
    before = find_norms(model)
    assert convert_norms(model, to).converted == [layer.name for layer in before]
    after = find_norms(model)
    assert [(layer.name, type(layer.module)) for layer in after] == [(layer.name, TARGETS[to]) for layer in before]
    args, kwargs = family.example()
    y = model(*args, **kwargs)
    y.backward(torch.randn_like(y))
    assert y.isfinite().all()
    for new, old in zip(after, before, strict=True):
        assert (new.channel_dim, new.num_features) == (old.channel_dim, old.num_features)
        assert new.gain is not None
        if old.gain is not None:
            assert torch.equal(new.gain, old.gain)
        if old.bias is not None:
            assert new.bias is not None
            assert torch.equal(new.bias, old.bias)
    norms: list[tuple[Any, Tensor, Tensor]] = []
    for layer in after:
        layer.module.register_forward_hook(lambda module, inputs, y: norms.append((module, inputs[0], y)))
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    assert {id(module) for module, _, _ in norms} == {id(layer.module) for layer in after}
    for module, x, y in norms:
        scale, shift, channel_dim = module.fold_affine()
        expected = (x.double().movedim(channel_dim, -1) * scale + shift).movedim(-1, channel_dim)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@targets
def test_weight_and_bias_are_the_same_parameters_so_an_optimizer_still_trains_them(to: Target) -> None:
    norm = nn.LayerNorm(8)
    model = nn.Sequential(nn.Linear(4, 8), norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight, bias = norm.weight, norm.bias
    weight.requires_grad_(False)
    assert convert_norms(model, to).norms[0].reason == "weight kept, bias kept"
    assert model[1].weight is weight
    assert model[1].bias is bias
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    assert bias.detach().any()
    assert weight.grad is None  # frozen before, frozen after


@pytest.mark.parametrize(
    ("norm", "to", "reason"),
    [
        (nn.LayerNorm(8, bias=False), "repbn", "weight kept, bias new"),
        (nn.LayerNorm(8, bias=False), "unified", "weight kept"),
        (nn.RMSNorm(8), "repbn", "weight kept"),
        (nn.RMSNorm(8), "power", "weight kept, bias new"),
        (nn.LayerNorm(8, elementwise_affine=False), "unified", "weight new"),
        (GemmaRMSNorm(8), "repbn", "weight new, of the same value"),
        (LayerNorm2d(8), "repbn", "weight kept, bias kept"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_report_says_what_was_kept(norm: nn.Module, to: Target, reason: str) -> None:
    model = nn.Sequential(norm)
    assert convert_norms(model, to).norms[0].reason == reason


@targets
def test_a_gain_of_one_plus_weight_keeps_its_value(to: Target) -> None:
    norm = GemmaRMSNorm(8)
    nn.init.normal_(norm.weight)
    model = nn.Sequential(norm)
    convert_norms(model, to)
    assert torch.equal(model.get_parameter("0.weight"), 1 + norm.weight)


@pytest.mark.parametrize(("to", "option"), [("repbn", "center"), ("unified", "bias")])
def test_a_norm_whose_bias_would_be_lost_is_left(to: Target, option: str) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8))
    options: dict[str, Any] = {option: False}
    report = convert_norms(model, to, **options)
    assert report.converted == ["1"]
    assert report.left == {"0": f"its bias would be lost: {option}=False has no place for one"}


def test_options_reach_the_new_norms_and_the_default_keeps_bursts_out() -> None:
    model: Any = nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8))
    convert_norms(model, "repbn")
    assert [(rep.center, rep.filtration, rep.eps) for rep in model] == [
        (True, "calibrated", 1e-5), (False, "calibrated", 1e-5)
    ]  # fmt: skip
    model = nn.Sequential(nn.LayerNorm(8))
    convert_norms(model, "unified", window=2, warmup_steps=7, sync=True)
    assert (model[0].windows, model[0].warmup_steps, model[0].sync) == ((2, 2), 7, True)


@pytest.mark.parametrize("to", ["unified", "power"])
def test_the_official_variants_train_the_kept_parameters_too(to: Target) -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    weight = model[0].weight
    convert_norms(model, to, variant="official")
    assert model[0].weight is model[0].official.weight is weight  # type: ignore[union-attr]
    model(torch.randn(2, 5, 8)).backward(torch.randn(2, 5, 8))
    assert weight.grad is not None


@targets
def test_a_shared_norm_is_replaced_under_every_name_by_one(to: Target) -> None:
    norm = nn.LayerNorm(8)
    model = nn.ModuleDict({"a": nn.Sequential(norm), "b": norm, "c": nn.Sequential(nn.Linear(8, 8), norm)})
    assert convert_norms(model, to).converted == ["a.0"]
    assert isinstance(model["b"], TARGETS[to])
    assert model["a"][0] is model["b"] is model["c"][1]  # type: ignore[index]


@targets
def test_hooks_move_over_and_their_handles_still_remove_them(to: Target) -> None:
    norm, seen = nn.LayerNorm(8), list[str]()
    before = norm.register_forward_pre_hook(lambda *_: seen.append("before"))
    after = norm.register_forward_hook(lambda module, args, kwargs, y: seen.append("after"), with_kwargs=True)
    norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    model = nn.Sequential(norm).eval()
    convert_norms(model, to)
    assert not model[0].training
    model(torch.randn(3, 8, requires_grad=True)).backward(torch.randn(3, 8))
    assert seen == ["before", "after", "backward"]
    before.remove()
    after.remove()
    model(torch.randn(3, 8))
    assert seen == ["before", "after", "backward"]


def test_what_cannot_be_replaced_is_left_with_the_reason() -> None:
    with pytest.raises(StabNormError, match="it is the model itself: only to='prepbn' or 'taper' can convert it"):
        convert_norms(nn.LayerNorm(8), "repbn")
    hooked = nn.LayerNorm(8)
    hooked.register_load_state_dict_post_hook(lambda *_: None)
    report = convert_norms(nn.Sequential(hooked, nn.LayerNorm((2, 8)), nn.LayerNorm(8)), "repbn")
    assert report.converted == ["2"]
    assert report.left["0"].startswith("it has state_dict hooks")
    assert report.left["1"] == "its channels are on 2 axes: only to='prepbn' or 'taper' can convert it"
