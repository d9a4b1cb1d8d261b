"""The way from a LayerNorm to none: convert, train, fold."""

import pytest
import torch
from torch import nn

from stabnorm import convert_norms, fold_norms
from stabnorm.nn import PRepBN
from tests.families import EVERY_FAMILY, Family, randomize_
from tests.fold.test_families import TABLE, cast, counts, error

pytestmark = pytest.mark.filterwarnings("ignore:a bias was added to .* LoRA adapters")


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_converted_model_folds_once_lam_is_zero(family: Family) -> None:
    model = family.build()
    convert_norms(model)
    randomize_(model, seed=1).double().eval()
    norms = [module for module in model.modules() if isinstance(module, PRepBN)]
    examples = [cast(family.example(seed), torch.float64) for seed in (0, 1)]
    for norm in norms:
        norm.lam.fill_(0.5)
    with pytest.warns(UserWarning, match="nothing is folded: no norm is affine in eval"):
        half_way = fold_norms(model, tuple(examples[0]))
    assert {(norm.status, "lam=0.5" in norm.reason) for norm in half_way.norms} == {("kept", True)}
    for norm in norms:
        norm.lam.zero_()
    result = fold_norms(model, tuple(examples[0]))
    assert len(result.norms) == len(norms) == family.norms
    assert counts(result) == TABLE[family.name][0 if norms[0].rep.center else 1]
    limit = 1e-5 if family.name == "gemma 2" else 1e-11  # its norm goes through float32 whatever the model
    assert error(result.model, model, examples) < limit
    assert not any(isinstance(module, nn.LayerNorm | nn.RMSNorm | PRepBN) for module in result.model.modules())
