"""Everything that looks at a norm's input finds it, however the model passes it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabnorm import (
    StabilityMonitor,
    convert_norms,
    find_norms,
    fold_norms,
    guard_folds,
    plan_fold,
    recalibrate_norms,
    register_norm,
    remove_norms,
    valid_tokens,
)
from stabnorm.companions.switching import BranchGap
from stabnorm.nn import PRepBN
from stabnorm.switch import progressive_norms

WIDTH = 6
Call = Callable[[nn.Module, Tensor], Tensor]


class NamedX(nn.LayerNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class NamedHiddenStates(nn.LayerNorm):
    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.layer_norm(hidden_states, self.normalized_shape, self.weight, self.bias, self.eps)


class NamedInput(nn.LayerNorm):
    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


CLASSES: dict[str, type[nn.LayerNorm]] = {"x": NamedX, "hidden_states": NamedHiddenStates, "input": NamedInput}
for each in CLASSES.values():
    register_norm(each, "layer", num_features="normalized_shape")


def calls(name: str) -> dict[str, Call]:
    return {
        "positional": lambda norm, x: norm(x),
        "positional with mask": lambda norm, x: norm(x, torch.ones(x.shape[:-1], dtype=torch.bool)),
        "by keyword": lambda norm, x: norm(**{name: x}),
        "by keyword, mask first": lambda norm, x: norm(mask=torch.ones(x.shape[:-1], dtype=torch.bool), **{name: x}),
    }


class Model(nn.Module):
    def __init__(self, norm: type[nn.LayerNorm], call: Call) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), norm(WIDTH), nn.Linear(WIDTH, 3)
        self.call = call
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.call(self.norm, self.first(x)))
        return y


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(8, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def switched(model: Model) -> Model:
    convert_norms(model)
    for norm in progressive_norms(model).values():
        norm.lam.zero_()
    recalibrate_norms(model, [inputs()], 1)
    return model.eval()


# --- what looks: each gives the numbers that it found ---


def by_the_monitor(model: Model) -> Any:
    with StabilityMonitor(model, ["token_std_mean", "affine_residual"]) as monitor:
        model(inputs())
        monitor.step()
    return list(monitor.history().values())


def by_the_branch_gap(model: Model) -> Any:
    convert_norms(model)
    gap = BranchGap(progressive_norms(model).values())
    gap.attach()
    gap.armed = True
    model(inputs())
    return gap.take()


def by_recalibration(model: Model) -> Any:
    convert_norms(model)
    recalibrate_norms(model, [inputs()], 1)
    assert isinstance(model.norm, PRepBN)
    return [model.norm.rep.running_mean, model.norm.rep.running_var]


def by_the_fold(model: Model) -> Any:
    result = fold_norms(switched(model), inputs())
    assert [norm.status for norm in result.norms] == ["forward"]
    return result.model(inputs())


def by_the_plan(model: Model) -> Any:
    (norm,) = plan_fold(model, inputs()).norms
    assert (norm.status, norm.into) == ("forward", ("last",))
    return torch.tensor(norm.affine_residual)


def by_the_guard(model: Model) -> Any:
    with guard_folds(fold_norms(switched(model), inputs()).model, [inputs()]) as guard:
        return torch.tensor(list(guard.bounds.values()))


def by_the_removal(model: Model) -> Any:
    result = remove_norms(model, [inputs(), inputs(1)])
    assert [norm.kept for norm in result.norms] == [False]
    return torch.tensor([result.norms[0].residual, result.norms[0].left])


READERS = [
    by_the_monitor,
    by_the_branch_gap,
    by_recalibration,
    by_the_fold,
    by_the_plan,
    by_the_guard,
    by_the_removal,
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", CLASSES)
def test_an_input_is_found_by_position_and_by_keyword_beside_a_mask(read: Callable[[Model], Any], name: str) -> None:
    expected = read(Model(NamedX, calls("x")["positional"]))
    for how, call in calls(name).items():
        names_read = read(Model(CLASSES[name], call))
        torch.testing.assert_close(names_read, expected, rtol=1e-5, atol=1e-6, msg=how)


@pytest.mark.parametrize("name", CLASSES)
def test_a_layer_knows_which_argument_is_its_input_and_gives_it_as_rows(name: str) -> None:
    (layer,) = find_norms(nn.Sequential(CLASSES[name](WIDTH)))
    x, mask = inputs(), torch.ones(8, 5, dtype=torch.bool)
    assert layer.input_of((x, mask), {}) is x
    assert layer.input_of((), {"mask": mask, name: x}) is x
    assert layer.input_of((), {"weights": torch.ones(2), name: x}) is x
    assert layer.input_of((), {}) is None
    rows = layer.rows(x)
    assert rows.shape == (40, WIDTH)
    assert torch.equal(layer.from_rows(rows, x.shape), x)


def test_a_layer_says_which_of_its_tokens_are_valid() -> None:
    images = nn.BatchNorm2d(4)
    (layer,) = find_norms(nn.Sequential(images))
    x, mask = torch.randn(2, 4, 3, 5), torch.rand(2, 3, 5) > 0.5
    assert layer.valid(x) is None
    with valid_tokens(mask):
        valid = layer.valid(x)
    assert valid is not None
    assert torch.equal(valid, mask)
    assert torch.equal(layer.rows(x)[valid.reshape(-1)], x.movedim(1, -1)[mask])
