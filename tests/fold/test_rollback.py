"""Each of the three folds with an error of a thousandth: it is noticed, undone and reported, and the model is right."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm import fold_norms
from stabnorm.fold import _apply
from stabnorm.fold._plan import Edit
from stabnorm.fold._verify import largest_error
from stabnorm.nn import RepBN
from tests.fold.nets import draw, error_of, net, ready

C, D = 6, 5
Fault = Callable[[Edit], Edit]

FOLDS = {
    "forward": net(lambda m, x: m.fc(m.norm(x)), norm=RepBN(C), fc=nn.Linear(C, D)),
    "backward": net(lambda m, x: m.norm(m.fc(x)).sin(), norm=RepBN(D), fc=nn.Linear(C, D)),
    "residual": net(
        lambda m, x: (lambda h: m.head(m.last(h + m.fc(h))))(m.norm(x)),
        norm=RepBN(C),
        fc=nn.Linear(C, C),
        last=RepBN(C),
        head=nn.Linear(C, D),
    ),
}
FAULTS: dict[str, Fault] = {
    "a scale of the inputs": lambda edit: dataclasses.replace(edit, in_scale=_off(edit.in_scale)),
    "a shift of the inputs": lambda edit: dataclasses.replace(edit, in_shift=_off(edit.in_shift)),
    "a scale of the outputs": lambda edit: dataclasses.replace(edit, out_scale=_off(edit.out_scale)),
    "a shift of the outputs": lambda edit: dataclasses.replace(edit, out_shift=_off(edit.out_shift)),
    "the order of the channels": lambda edit: dataclasses.replace(edit, in_scale=edit.in_scale.flip(-1)),
    "no bias": lambda edit: dataclasses.replace(
        edit, in_shift=torch.zeros_like(edit.in_shift), out_shift=torch.zeros_like(edit.out_shift)
    ),
}


def _off(t: torch.Tensor) -> torch.Tensor:
    return 1.001 * t + 1e-3


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_wrong_fold_is_taken_back(
    fold: str, fault: Fault, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ready(FOLDS[fold]()).to(dtype)
    x = draw(3, 4, C).to(dtype)
    assert fold_norms(model, x).norms[0].status == fold
    right: Any = _apply._edit
    monkeypatch.setattr(_apply, "_edit", lambda model, edit: right(model, fault(edit)))
    result = fold_norms(model, x)
    if fold == "backward" and fault is FAULTS["the order of the channels"]:
        assert result.norms[0].status == "backward"  # it scales no input, in whatever order
        return
    assert result.norms[0].status == "affine"
    assert "rolled back: the output would be off by" in result.norms[0].reason
    wide = ready(FOLDS[fold]()).to(dtype).double()
    assert error_of(result.model.double(), wide, [(draw(2, C, seed=3),)]) < (1e-12 if dtype == torch.float64 else 1e-6)


def test_an_output_that_is_close_to_zero_on_one_input_is_judged_by_its_scale_on_all() -> None:
    usual, single = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0.9, 3e-4]])
    rounded = [[usual], [single + torch.tensor([[0.0, 1e-7]])]]
    assert largest_error(rounded, [[usual], [single]]) == pytest.approx(1e-7, rel=0.2)
    assert largest_error([[usual * 1.01], [single]], [[usual], [single]]) == pytest.approx(0.01, rel=0.01)
    assert largest_error([[usual], [single * torch.nan]], [[usual], [single]]) == float("inf")
    assert largest_error([[usual], [single / 0.0]], [[usual], [single]]) == float("inf")
