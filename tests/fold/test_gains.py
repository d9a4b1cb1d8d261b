"""The gain and bias of norms that stay fold into what reads them, exactly, and leave the norm with none."""

import pytest
import torch
from torch import nn

from stabnorm import find_norms, fold_gains, fold_norms
from stabnorm.nn import RepBN
from tests.families import EVERY_FAMILY, Family, randomize_
from tests.fold.nets import Net, draw, error_of, ready
from tests.fold.test_families import cast, error

pytestmark = pytest.mark.filterwarnings("ignore:a bias was added to .* LoRA adapters")
# How many gains no linear layer reads: on the residual stream, before positions are mixed, in front of attention.
STAY = {
    "vit, qk-norm": 4, "mixer": 2, "swin": 1, "swin, padded windows": 5, "swin v2": 10, "convnext": 1, "pvt": 3,
    "bert": 4, "albert, one shared block": 2, "gemma 2": 4, "qwen 3": 4, "olmo 2": 8, "mixture of experts": 0,
    "torch encoder, post-norm": 4, "torch encoder, post-norm, bias-free": 4, "torch transformer, post-norm": 10,
    "peri-ln with multi-head attention": 4, "weight-normed linears": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_gains_fold_where_linears_read_them(family: Family) -> None:
    model = randomize_(family.build(), seed=1).double().eval()
    examples = [cast(family.example(seed), torch.float64) for seed in (0, 1)]
    result = fold_gains(model, tuple(examples[0]))
    assert {norm.status for norm in result.norms} == {"kept"}
    assert sum(not norm.into for norm in result.norms) == STAY.get(family.name, 0), str(result)
    assert all(bool(norm.into) != bool(norm.reason) for norm in result.norms)
    limit = 1e-5 if family.name == "gemma 2" else 1e-9  # its norm goes through float32 whatever the model
    assert error(result.model, model, examples) < limit
    for norm, layer in zip(result.norms, find_norms(result.model), strict=True):
        gain, bias = layer.gain, layer.bias
        if norm.into:
            assert gain is None or bool((gain == 1).all())
            assert bias is None or bool((bias == 0).all())


def test_norms_fold_first_and_the_gains_of_those_that_stay_after_them() -> None:
    model = ready(nn.Sequential(RepBN(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 5, bias=False)))
    folded = fold_gains(fold_norms(model, draw(3, 6)).model, draw(3, 6))
    assert [(norm.name, norm.into) for norm in folded.norms] == [("2", ("3",))]
    assert folded.manifest["biases"] == {"3.bias": 5}
    assert error_of(folded.model, model, [(draw(2, 6, seed=1),)]) < 1e-12


def test_a_gain_that_another_norm_reads_too_is_left() -> None:
    parts = {"norm": nn.LayerNorm(6), "fc": nn.Linear(6, 5), "after": nn.LayerNorm(6), "head": nn.Linear(6, 5)}
    model = ready(Net(lambda m, x: (lambda h: m.fc(h) * m.head(m.after(h)))(m.norm(x)), **parts))
    result = fold_gains(model, draw(3, 6))
    assert result.norms[0].reason == "norm 'after' normalises it"
    assert result.norms[1].into == ("head",)


def test_a_norm_without_gain_says_so() -> None:
    model = ready(nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 5)))
    assert fold_gains(model, draw(3, 6)).norms[0].reason == "it has neither gain nor bias"
