"""The model families are what they claim: their number of norms, and that the output depends on each."""

import pytest
import torch
from torch import nn

from stabnorm import find_norms
from tests.families import EVERY_FAMILY, Family, randomize_

families = pytest.mark.parametrize("family", EVERY_FAMILY)


@families
def test_every_norm_is_found_and_every_number_in_it_reaches_the_output(family: Family) -> None:
    model = randomize_(family.build(), seed=1)
    layers = find_norms(model)
    assert len(layers) == family.norms
    assert {layer.kind for layer in layers} <= {"layer", "rms"}
    args, kwargs = family.example()
    y = model(*args, **kwargs)
    y.backward(torch.randn_like(y))
    for layer in layers:
        for parameter in (layer.gain_parameter, layer.bias_parameter):
            # One shift of all keys leaves the attention as it is.
            if parameter is not None and not (parameter is layer.bias_parameter and layer.name.endswith("k_norm")):
                assert parameter.grad is not None
                assert parameter.grad.abs().max() > 1e-3


@families
def test_a_model_and_an_input_are_their_seeds_and_leave_the_random_state_alone(family: Family) -> None:
    before = torch.get_rng_state()
    model, twin = (randomize_(family.build(seed=3), seed=2).eval() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(parameter.numel() for parameter in model.parameters()) < 10_000
    with torch.no_grad():
        first, again = (each(*family.example().args, **family.example().kwargs) for each in (model, twin))
        args, kwargs = family.example(seed=1)
        other = model(*args, **kwargs)
    assert torch.equal(first, again)
    assert first.shape != other.shape
    assert first.isfinite().all()
    assert first.std() > 0.01


def test_nothing_stays_where_a_fresh_model_has_it() -> None:
    model = randomize_(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)))
    for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert name.endswith("num_batches_tracked") or not torch.isin(value, torch.tensor([0.0, 1.0])).any(), name
