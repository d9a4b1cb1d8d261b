"""Norms whose gain has an axis more, such as one gain for each channel of each attention head, convert and fold."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, apply_manifest, convert_norms, find_norms, fold_norms, recalibrate_norms
from stabnorm.nn import PRepBN
from tests.fold.nets import Net, draw, error_of, ready

HEADS, D = 3, 4


class HeadNorm(nn.Module):
    """Cohere's norm of queries and keys, or the same with Llama's formula."""

    def __init__(self, centre: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.centre = centre
        self.weight = nn.Parameter(torch.rand(HEADS, D) + 0.5)
        self.bias = nn.Parameter(torch.randn(HEADS, D)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centre else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight
        return x if self.bias is None else x + self.bias


class Attention(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(8, 12)
        self.q_norm, self.k_norm, self.out = HeadNorm(**options), HeadNorm(**options), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, D)) for layer in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = q + 0.1 * q.roll(1, -1), k + 0.1 * k.roll(1, -1)  # as a rotary embedding does: channels meet channels
        y = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


OPTIONS = [{}, {"centre": False}, {"bias": True}]


def switched(model: nn.Module, x: Tensor) -> nn.Module:
    convert_norms(model.double())
    model.train()(x)
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.lam.zero_()
    return ready(model)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_gain_for_each_head_converts_without_a_change_of_the_output(options: Any) -> None:
    model, x = Attention(**options).double(), draw(2, 5, 8)
    before = model(x)
    (layer, _) = find_norms(model)
    assert (layer.kind, layer.num_features) == ("layer" if options.get("centre", True) else "rms", HEADS * D)
    assert layer.gain is not None
    assert layer.gain.shape == (HEADS * D,)
    assert convert_norms(model).converted == ["q_norm", "k_norm"]
    assert torch.equal(model(x), before)
    assert model.q_norm.get_submodule("rep").get_buffer("running_var").shape == (HEADS * D,)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_folds_into_the_rows_of_the_projection_before_a_rotary_embedding(options: Any) -> None:
    model = switched(Attention(**options), draw(4, 5, 8))
    result = fold_norms(model, draw(2, 5, 8))
    assert [(norm.status, norm.into) for norm in result.norms] == [("backward", ("q",)), ("backward", ("k",))]
    assert error_of(result.model, model, [(draw(3, 7, 8, seed=1),)]) < 1e-12


def test_what_cannot_take_it_in_leaves_one_multiply_add_that_saves_and_loads() -> None:
    model = switched(
        Net(lambda m, x: m.fc(m.norm(x).abs().flatten(2)), norm=HeadNorm(), fc=nn.Linear(12, 2)), draw(4, 5, HEADS, D)
    )
    result = fold_norms(model, draw(2, 5, HEADS, D))
    assert [norm.status for norm in result.norms] == ["affine"]
    fresh = apply_manifest(copy.deepcopy(model), json.loads(json.dumps(result.manifest)))
    fresh.load_state_dict(result.model.state_dict())
    assert error_of(fresh, model, [(draw(3, 6, HEADS, D, seed=1),)]) < 1e-12


def test_torchs_layer_norm_over_several_axes_folds_too() -> None:
    model = switched(
        Net(lambda m, x: m.fc(m.norm(x).flatten(1)), norm=nn.LayerNorm((HEADS, D)), fc=nn.Linear(12, 2)),
        draw(6, HEADS, D),
    )
    result = fold_norms(model, draw(3, HEADS, D))
    assert [norm.status for norm in result.norms] == ["forward"]
    assert error_of(result.model, model, [(draw(5, HEADS, D, seed=1),)]) < 1e-12


def test_a_norm_per_head_is_watched_recalibrated_and_copied() -> None:
    model, x = Attention().double(), draw(2, 5, 8)
    with StabilityMonitor(model) as monitor:
        model(x).sum().backward()
        monitor.step()
        assert len(next(iter(monitor.history().values()))[0]) == 2
    model.zero_grad()
    switched(model, x)
    recalibrate_norms(model, [draw(2, 5, 8, seed=n) for n in range(3)], 3)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert [layer.num_features for layer in find_norms(model)] == [HEADS * D] * 2
