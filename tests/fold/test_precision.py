"""What folding does to rounding, where statistics fit the data: distances from the model in float64."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from stabnorm import fold_norms
from stabnorm.nn import RepBN
from tests.families import EVERY_FAMILY, FAMILIES, Example, Family
from tests.fold.test_families import cast, ready

pytestmark = pytest.mark.filterwarnings("ignore:a bias was added to .* LoRA adapters")
# The look-alikes below multiply tables in float32 into their activations and do not run in bfloat16.
FLOAT32_ONLY = {"swin v2", "llama", "llama, tied head", "gemma 2", "qwen 3", "olmo 2", "mixture of experts"}


@pytest.fixture(autouse=True)
def _plain_encoders() -> Iterator[None]:
    """Torch's fused encoder layers skip norms they do not know."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def calibrated(family: Family, seed: int = 1) -> nn.Module:
    """With running statistics from data."""
    model = ready(family, center=True, seed=seed).train()
    for module in model.modules():
        if isinstance(module, RepBN):
            module.reset_running_stats()
            module.momentum = None  # a plain average
    with torch.no_grad():
        for draw in range(20, 26):
            args, kwargs = family.example(draw)
            model(*args, **kwargs)
    return model.eval()


@torch.no_grad()
def distance(model: nn.Module, truth: nn.Module, examples: list[Example]) -> float:
    """Root mean square over the examples of what the output is off by, relative to its size."""
    squares, dtype = [], next(model.parameters()).dtype
    for example in examples:
        args, kwargs = cast(example, dtype)
        true_args, true_kwargs = cast(example, torch.float64)
        y, expected = model(*args, **kwargs).double(), truth(*true_args, **true_kwargs)
        squares.append(float((y - expected).square().sum() / expected.square().sum()))
    return math.sqrt(sum(squares) / len(squares))


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_float32_is_no_further_off_than_the_unfolded_model_times_four(family: Family) -> None:
    model = calibrated(family)
    truth, examples = copy.deepcopy(model).double(), [family.example(seed) for seed in range(8)]
    folded = fold_norms(model, tuple(examples[0])).model
    assert distance(folded, truth, examples) < 4 * distance(model, truth, examples)


@pytest.mark.slow
def test_folded_in_float32_and_then_cast_to_bfloat16_it_is_no_worse_than_the_unfolded_model() -> None:
    ratios = []  # of two roundings of a small model: they scatter, so it is their mean that counts
    for family in FAMILIES.values():
        for seed in (1,) if family.name not in FLOAT32_ONLY else ():
            model = calibrated(family, seed)
            truth, examples = copy.deepcopy(model).double(), [family.example(seed) for seed in range(6)]
            folded = fold_norms(model, tuple(examples[0])).model
            own, of_fold = (distance(each.bfloat16(), truth, examples) for each in (model, folded))
            ratios.append(of_fold / own)
    assert math.prod(ratios) ** (1 / len(ratios)) < 1
    assert max(ratios) < 1.6


@pytest.mark.parametrize(
    ("gain", "weight", "reading"), [(300.0, 500.0, 1e-2), (1e-4, 1e-3, 1e4)], ids=["overflow", "underflow"]
)
def test_a_weight_that_float16_cannot_hold_is_not_folded_though_float64_could(
    gain: float, weight: float, reading: float
) -> None:
    norm, linear = RepBN(6, init="norm"), nn.Linear(6, 5, bias=False)
    nn.init.constant_(norm.weight, gain)
    nn.init.uniform_(linear.weight, 0.8 * weight, 1.2 * weight)
    model = nn.Sequential(norm, linear).eval()
    x = reading * torch.randn(3, 4, 6)
    (wide,) = fold_norms(copy.deepcopy(model), x, check=x.flip(0)).norms
    assert wide.status == "forward"
    (narrow,) = fold_norms(model.half(), x.half(), check=x.half().flip(0)).norms
    assert narrow.status == "affine"
    assert "rolled back: the output would be off by" in narrow.reason
