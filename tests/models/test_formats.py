"""What reads a loader reads batches, what reads examples reads examples: each format means the same to all of them."""

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import (
    convert_norms,
    fold_gains,
    fold_norms,
    guard_folds,
    plan_fold,
    recalibrate_norms,
    remove_norms,
    to_pre_rms,
)
from stabnorm.nn import PRepBN, RepBN

WIDTH = 4
Pair = collections.namedtuple("Pair", "inputs targets")  # as a Dataset of a user's may give


class Scaled(nn.Module):
    """Takes a second argument, so that a target that is handed to the model shows."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), norm(WIDTH), nn.Linear(WIDTH, 2)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x if scale is None else x * scale)))
        return y


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.full((32, 1), 100.0)
SCALE = torch.tensor([3.0])

# --- batches ---

BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, TARGETS),
    "list": lambda x: [x, TARGETS],
    "named tuple": lambda x: Pair(x, TARGETS),
    "mapping": lambda x: {"x": x},
}
Forward = Callable[[nn.Module, Any], Any] | None


def recalibrated(loader: list[Any], forward: Forward = None) -> Any:
    model = Scaled(RepBN)
    recalibrate_norms(model, loader, 9, forward=forward)
    return list(model.norm.buffers())


def removed(loader: list[Any], forward: Forward = None) -> Any:
    return list(remove_norms(Scaled(nn.LayerNorm).eval(), loader, forward=forward).model.parameters())


def converted(loader: list[Any]) -> Any:
    model = Scaled(nn.LayerNorm)
    convert_norms(model, init="fit", loader=loader)
    assert isinstance(model.norm, PRepBN)
    return [model.norm.rep.weight, model.norm.rep.bias]


def guarded(loader: list[Any], forward: Forward = None) -> Any:
    folded = fold_norms(Scaled(RepBN).eval(), inputs()).model
    with guard_folds(folded, loader, forward=forward) as guard:
        return torch.tensor(list(guard.bounds.values()))


@pytest.mark.parametrize("read", [recalibrated, removed, converted, guarded])
def test_a_batch_is_read_alike_by_all_that_take_a_loader(read: Callable[..., Any]) -> None:
    expected = read([inputs(0), inputs(1)])
    for name, batch in BATCHES.items():
        outputs = read([batch(inputs(0)), batch(inputs(1))])
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("read", [recalibrated, removed, guarded])
def test_a_forward_says_what_else_the_model_takes(read: Callable[..., Any]) -> None:
    expected = read([3 * inputs(0), 3 * inputs(1)])
    outputs = read([(inputs(0), SCALE), (inputs(1), SCALE)], lambda model, batch: model(*batch))
    torch.testing.assert_close(outputs, expected)
    outputs = read([{"x": inputs(0), "scale": SCALE}, {"x": inputs(1), "scale": SCALE}])
    torch.testing.assert_close(outputs, expected)
    named = [Pair(inputs(0), SCALE), Pair(inputs(1), SCALE)]
    outputs = read(named, lambda model, batch: model(batch.inputs, batch.targets))
    torch.testing.assert_close(outputs, expected)


# --- examples ---

EXAMPLES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "positional": lambda x: (x,),
    "by keyword": lambda x: {"x": x},
    "both": lambda x: ((x,), {"scale": None}),
    "only keywords of both": lambda x: ((), {"x": x}),
    "several": lambda x: [x, {"x": x}],
}


def folded(example: Any) -> Any:
    result = fold_norms(Scaled(RepBN).eval(), example)
    return [norm.into for norm in result.norms], result.max_rel_error < 1e-9


def gains_folded(example: Any) -> Any:
    result = fold_gains(Scaled(nn.LayerNorm).eval(), example)
    return [norm.into for norm in result.norms], result.max_rel_error < 1e-9


def centred(example: Any) -> Any:
    result = to_pre_rms(Scaled(nn.LayerNorm).eval(), example)
    return [(norm.status, norm.into) for norm in result.norms]


def planned(example: Any) -> Any:
    norms = plan_fold(Scaled(nn.LayerNorm), example).norms
    return [(norm.status, norm.into, round(norm.affine_residual, 4)) for norm in norms]


@pytest.mark.parametrize("read", [folded, gains_folded, centred, planned])
def test_an_example_is_read_alike_by_all_that_take_one(read: Callable[[Any], Any]) -> None:
    expected = read(inputs())
    for name, example in EXAMPLES.items():
        assert read(example(inputs())) == expected, name


@pytest.mark.parametrize("read", [folded, gains_folded, centred, planned])
def test_a_tuple_is_an_examples_arguments_and_no_pair_of_input_and_target(read: Callable[[Any], Any]) -> None:
    assert read((inputs(), SCALE)) == read(((inputs(),), {"scale": SCALE}))
    with pytest.raises(ValueError, match="does not run on the example"):
        read((inputs(), torch.ones(7, 7)))
    with pytest.raises(TypeError, match=r"example=.* is of type str. Give a tensor, a tuple of positional arguments"):
        read("x")
    with pytest.raises(ValueError, match=r"example=\[\] holds no input"):
        read([])
