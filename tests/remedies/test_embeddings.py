"""`stable_embedding`: every token has the same scale, and the drawn weight is within Xavier's bound."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm import StabNormError, convert_norms, fold_norms
from stabnorm.remedies import stable_embedding
from tests.remedies.family import in_the_family, largest, net, tokens, train


@in_the_family
def test_stable_embedding(check: Callable[..., None]) -> None:
    """What holds for every remedy."""
    check(net, tokens(), lambda model: stable_embedding(model, init=False))


def test_the_output_has_an_rms_of_one_and_the_weight_is_within_xaviers_bound() -> None:
    """methods.md section 4, stable embedding: output rms = 1."""
    model: Any = nn.Sequential(nn.Embedding(50, 30, padding_idx=3))
    stable_embedding(model)
    rms = model(torch.arange(50)).square().mean(-1).sqrt()
    torch.testing.assert_close(rms[torch.arange(50) != 3], torch.ones(49), rtol=0.02, atol=0)
    weight = model[0].weight.detach()
    assert float(weight.abs().max()) <= (6 / 80) ** 0.5
    assert not bool(weight[3].any())


def test_the_switched_norm_folds_forward() -> None:
    model = net().double()
    stable_embedding(model)
    convert_norms(model, to="unified")
    train(model, tokens(), steps=3)
    model.eval()
    result = fold_norms(model, tokens())
    assert largest(result.model(tokens()), model(tokens())) < 1e-12


def test_a_second_call_is_refused() -> None:
    model = net()
    stable_embedding(model)
    with pytest.raises(StabNormError, match="normalised already"):
        stable_embedding(model)
