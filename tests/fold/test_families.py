"""Every family of models with its norms switched: how many fold, how, and how exactly."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import fold_norms
from stabnorm.fold import FoldResult
from tests.families import EVERY_FAMILY, Example, Family, randomize_
from tests.fold.nets import error_of, swapped

pytestmark = pytest.mark.filterwarnings("ignore:a bias was added to .* LoRA adapters")
FOLDED = ("forward", "residual", "backward")
# How many norms go forward, along a residual stream and backward, and how many are left: with a mean, without one.
TABLE: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    "vit, class token": ((5, 0, 0, 0), (5, 0, 0, 0)),
    "vit, qk-norm": ((5, 0, 4, 0), (5, 0, 4, 0)),
    "vit, mean pool and fc_norm": ((5, 0, 0, 0), (5, 0, 0, 0)),
    "deit, distilled": ((5, 0, 0, 0), (5, 0, 0, 0)),
    "mixer": ((3, 0, 0, 2), (3, 0, 0, 2)),  # token mixing contracts positions
    "swin": ((10, 0, 1, 0), (10, 0, 1, 0)),
    "swin, padded windows": ((6, 0, 1, 4), (10, 0, 1, 0)),  # zeros behind the norm take no shift
    "swin v2": ((1, 0, 10, 0), (1, 0, 10, 0)),
    "convnext": ((6, 0, 1, 0), (6, 1, 0, 0)),
    "pvt": ((6, 2, 0, 1), (7, 2, 0, 0)),  # a padded convolution reads the stage's norm
    "bert": ((1, 4, 0, 0), (1, 4, 0, 0)),
    "albert, one shared block": ((1, 1, 0, 1), (1, 1, 0, 1)),
    "gpt-2, tied head": ((5, 0, 0, 0), (5, 0, 0, 0)),
    "nanogpt, bias-free": ((5, 0, 0, 0), (5, 0, 0, 0)),
    "nanogpt with lora": ((5, 0, 0, 0), (5, 0, 0, 0)),
    "llama": ((5, 0, 0, 0), (5, 0, 0, 0)),
    "llama, tied head": ((5, 0, 0, 0), (5, 0, 0, 0)),
    "gemma 2": ((5, 0, 4, 0), (5, 0, 4, 0)),
    "qwen 3": ((5, 0, 4, 0), (5, 0, 4, 0)),
    "olmo 2": ((1, 0, 8, 0), (1, 0, 8, 0)),
    "mixture of experts": ((3, 0, 0, 2), (5, 0, 0, 0)),  # bare parameters have no bias
    "t5": ((12, 0, 0, 0), (12, 0, 0, 0)),
    "whisper": ((7, 0, 0, 0), (7, 0, 0, 0)),
    "torch encoder, pre-norm": ((5, 0, 0, 0), (5, 0, 0, 0)),
    "torch encoder, post-norm": ((2, 3, 0, 0), (2, 3, 0, 0)),
    "torch encoder, pre-norm, bias-free": ((5, 0, 0, 0), (5, 0, 0, 0)),
    "torch encoder, post-norm, bias-free": ((2, 3, 0, 0), (2, 3, 0, 0)),
    "torch transformer, pre-norm": ((12, 0, 0, 0), (12, 0, 0, 0)),
    "torch transformer, post-norm": ((4, 8, 0, 0), (4, 8, 0, 0)),
    "peri-ln with multi-head attention": ((4, 0, 4, 0), (4, 0, 4, 0)),
    "weight-normed linears": ((0, 0, 0, 2), (0, 0, 0, 2)),
}


def ready(family: Family, center: bool, seed: int = 1) -> nn.Module:
    """With everything drawn; eta so small that nothing saturates."""
    model = randomize_(swapped(family.build(), center), seed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("eta"):
                parameter.mul_(0.2)
    return model


def cast(example: Example, dtype: torch.dtype) -> Example:
    def to(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    return Example(tuple(map(to, example.args)), {name: to(value) for name, value in example.kwargs.items()})


def counts(result: FoldResult) -> tuple[int, ...]:
    assert {norm.status for norm in result.norms} <= {*FOLDED, "affine"}
    return tuple(sum(norm.status == status for norm in result.norms) for status in (*FOLDED, "affine"))


class Positional(nn.Module):
    """Takes an example's keyword arguments by position, so that one helper runs all."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Any) -> Any:
        count = len(values) - len(self.names)
        return self.model(*values[:count], **dict(zip(self.names, values[count:], strict=True)))


def error(folded: nn.Module, model: nn.Module, examples: list[Example]) -> float:
    names = tuple(examples[0].kwargs)
    inputs = [(*example.args, *example.kwargs.values()) for example in examples]
    return error_of(Positional(folded, names), Positional(model, names), inputs)


@pytest.mark.parametrize("center", [True, False], ids=["with a mean", "scale only"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_family_folds_exactly(family: Family, center: bool) -> None:
    model = ready(family, center).double()
    examples = [cast(family.example(seed), torch.float64) for seed in (0, 1)]
    result = fold_norms(model, tuple(examples[0]))
    assert counts(result) == TABLE[family.name][0 if center else 1], str(result)
    assert not result.vacuous
    assert result.max_rel_error < 1e-12
    assert error(result.model, model, examples) < 1e-12  # the second has another size
    assert all(norm.reason for norm in result.norms if norm.status == "affine")
    assert center or not result.manifest["biases"]
