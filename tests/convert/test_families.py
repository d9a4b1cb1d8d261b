"""On every model family: conversion changes no bit at lam = 1, at lam = 0 RepBN is all there is, checkpoints fit."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stabnorm import convert_norms, find_norms
from stabnorm.nn import PRepBN, RepBN
from tests.families import EVERY_FAMILY, Example, Family, randomize_
from tests.families.decoders import GemmaRMSNorm, LlamaRMSNorm
from tests.families.seq2seq import T5LayerNorm

families = pytest.mark.parametrize("family", EVERY_FAMILY)
SEVERAL_OPERATIONS = (LlamaRMSNorm, GemmaRMSNorm, T5LayerNorm)


def run(model: nn.Module, example: Example) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and every gradient for the same random upstream."""
    model.zero_grad()
    y: Tensor = model(*example.args, **example.kwargs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), gradients


def pair(family: Family) -> tuple[nn.Module, nn.Module]:
    """A model, and the same converted, with nothing in its RepBNs that is 0 or 1."""
    plain = randomize_(family.build(), seed=1)
    model = family.build()
    convert_norms(model)
    randomize_(model, seed=2).load_state_dict(plain.state_dict())
    return plain, model


def widened(example: Example) -> Example:
    """In float64."""
    return Example(tuple(arg.double() if arg.is_floating_point() else arg for arg in example.args), example.kwargs)


def preps(model: nn.Module) -> list[PRepBN]:
    return [module for module in model.modules() if isinstance(module, PRepBN)]


@families
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_converted_model_computes_what_it_did(family: Family, training: bool) -> None:
    plain, model = (each.train(training) for each in pair(family))
    assert len(preps(model)) == family.norms
    for seed in (0, 1):
        y, gradients = run(plain, family.example(seed))
        z, with_rep = run(model, family.example(seed))
        assert torch.equal(z, y)
        rest: dict[str, float] = {}
        if any(isinstance(module, SEVERAL_OPERATIONS) for module in plain.modules()):
            # The norm's own gradients are added up before the residual's joins them: another order of one sum, of which
            # float64 leaves next to nothing.
            example = widened(family.example(seed))
            (_, gradients), (_, with_rep) = (run(copy.deepcopy(each).double(), example) for each in (plain, model))
            rest = {name: 1e-13 * float(gradient.abs().max()) for name, gradient in gradients.items()}
        for name, gradient in gradients.items():
            torch.testing.assert_close(with_rep[name], gradient, rtol=0, atol=rest.get(name, 0.0), msg=name)
        assert all(not with_rep[name].any() for name in with_rep.keys() - gradients.keys())  # RepBN's: silent


class Formula(nn.Module):
    """RepBN, written down once more."""

    def __init__(self, rep: RepBN) -> None:
        super().__init__()
        self.rep = rep

    def forward(self, x: Tensor) -> Tensor:
        rep = self.rep
        tokens = x.movedim(rep.channel_dim, -1).reshape(-1, rep.num_features)
        if rep.center:
            mean, var = (None, None) if self.training else (rep.running_mean, rep.running_var)
            y = F.batch_norm(tokens, mean, var, rep.weight, rep.bias, self.training, eps=rep.eps)
        else:
            square = tokens.square().mean(0) if self.training else rep.running_var
            y = tokens / (square + rep.eps).sqrt() * rep.weight
        y = y.reshape(x.movedim(rep.channel_dim, -1).shape).movedim(-1, rep.channel_dim)
        return y + rep.eta * x


@families
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_at_lam_zero_repbn_is_all_there_is(family: Family, training: bool) -> None:
    _, model = (each.double().train(training) for each in pair(family))
    reference = copy.deepcopy(model)
    for name, module in [*reference.named_modules(remove_duplicate=False)]:
        if isinstance(module, PRepBN):
            parent, _, child = name.rpartition(".")
            setattr(reference.get_submodule(parent), child, Formula(module.rep).train(training))
    for prep in preps(model):
        prep.lam.zero_()
    example = widened(family.example())
    y, gradients = run(reference, example)
    z, ours = run(model, example)
    # In eval nothing normalises, and an error grows with depth as the activations do.
    torch.testing.assert_close(z, y, rtol=0, atol=1e-10 * float(y.abs().max()))
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-8 * largest)
    own = {name for name in ours if ours[name].any()}
    assert own <= gradients.keys()  # the norms' weights no longer matter


@families
def test_names_parameters_and_find_norms_entries_stay(family: Family) -> None:
    model = randomize_(family.build(), seed=1)
    before = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    layers = find_norms(model)
    objects, classes = [layer.module for layer in layers], [type(layer.module) for layer in layers]
    report = convert_norms(model)
    assert report.converted == [layer.name for layer in layers]
    assert before.items() <= {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}.items()
    for new, old, module, norm_class in zip(find_norms(model), layers, objects, classes, strict=True):
        assert new.module is module
        assert isinstance(module, PRepBN)
        assert isinstance(module, norm_class)
        assert (new.name, new.kind, new.channel_dim, new.num_features, new.gain_offset, new.feature_dims) == (
            old.name, old.kind, old.channel_dim, old.num_features, old.gain_offset, old.feature_dims
        )  # fmt: skip
        assert new.eps == pytest.approx(old.eps)
        assert new.gain_parameter is old.gain_parameter
        assert new.bias_parameter is old.bias_parameter
        assert module.rep.center == (old.kind == "layer")
        assert module.rep.filtration == "calibrated"
    assert set(convert_norms(model).left.values()) == {"already converted to PRepBN"}
    assert "PRepBN" in repr(model)


@families
def test_checkpoints_copies_and_pickles_are_whole(family: Family) -> None:
    plain, model = pair(family)
    for prep in preps(model):
        prep.lam.fill_(0.25)
    args, kwargs = family.example()
    y = model.eval()(*args, **kwargs)
    fresh = family.build()
    convert_norms(fresh)
    fresh.load_state_dict(model.state_dict())
    twins = [fresh, copy.deepcopy(model)]
    if not any(parametrize.is_parametrized(module) for module in model.modules()):  # torch refuses those
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(twin.eval()(*args, **kwargs), y)
        assert [type(prep) for prep in preps(twin)] == [type(prep) for prep in preps(model)]
        assert len(find_norms(twin)) == family.norms
    untouched = copy.deepcopy(plain.state_dict())
    fresh.load_state_dict(untouched)
    assert untouched.keys() == plain.state_dict().keys()
    for ours, theirs in zip(preps(fresh), preps(model), strict=True):
        assert ours.lam == 0.25
        assert torch.equal(ours.rep.weight, theirs.rep.weight)
