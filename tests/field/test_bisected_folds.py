"""A fold that does not hold is bisected: few trials, and only the norms that are to blame stay."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import fold_norms
from stabnorm.fold import _settle
from stabnorm.nn import RepBN
from tests.fold.nets import draw, error_of, ready

C, DEPTH = 4, 24


class Liar(nn.Module):
    """Says it is affine, and is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.abs().mean(-1, keepdim=True)

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        return torch.ones(C), torch.zeros(C), -1


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.fc = norm, nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + 0.1 * self.fc(self.norm(x)).tanh()
        return y


@pytest.mark.slow
@pytest.mark.parametrize("liars", [{5}, {5, 17}, set(range(DEPTH))], ids=["one", "two", "all"])
def test_what_fails_is_found_in_few_trials(liars: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    tries, real = [0], _settle._try

    def counted(*args: Any) -> Any:
        tries[0] += 1
        return real(*args)

    monkeypatch.setattr(_settle, "_try", counted)
    model = ready(nn.Sequential(*(Block(Liar() if i in liars else RepBN(C)) for i in range(DEPTH))))
    result = fold_norms(model, draw(3, C))
    assert {norm.name for norm in result.norms if norm.status == "kept"} == {f"{i}.norm" for i in liars}
    assert all("rolled back" in norm.reason for norm in result.norms if norm.status == "kept")
    assert error_of(result.model, model, [(draw(5, C, seed=1),)]) < 1e-12
    assert tries[0] < 3 * DEPTH
