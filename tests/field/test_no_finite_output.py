"""An example on which the model returns no finite number would hide every fault of a fold: it is told so."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import fold_norms, plan_fold
from stabnorm.fold import fold_gains, to_pre_rms
from stabnorm.nn import RepBN
from tests.fold.nets import Net, draw, ready

C, D = 6, 5
VERBS: dict[str, Callable[..., Any]] = {
    "fold_norms": fold_norms,
    "fold_norms, strict": lambda model, example, **options: fold_norms(model, example, strict=True, **options),
    "fold_norms, in place": lambda model, example, **options: fold_norms(model, example, inplace=True, **options),
    "fold_gains": fold_gains,
    "to_pre_rms": to_pre_rms,
    "plan_fold": plan_fold,
}
BAD: dict[str, tuple[Tensor, str]] = {
    "NaN": (draw(4, C) * torch.nan, "only NaN and infinities"),
    "infinity": (draw(4, C) / 0, "only NaN and infinities"),
    "no rows": (draw(0, C), "no number"),
}


def model() -> nn.Module:
    parts = {"fc": nn.Linear(C, C), "norm": RepBN(C), "ln": nn.LayerNorm(C), "head": nn.Linear(C, D)}
    return ready(Net(lambda m, x: m.head(m.ln(m.fc(m.norm(x)))), **parts))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("verb", VERBS)
def test_such_an_example_is_refused_and_nothing_changes(verb: str, bad: str) -> None:
    example, says = BAD[bad]
    model_ = model()
    before, classes = copy.deepcopy(model_.state_dict()), [type(each) for each in model_.modules()]
    with pytest.raises(ValueError, match=f"on the example the model returns {says}.*Pass inputs with at least one row"):
        VERBS[verb](model_, example)
    assert [type(each) for each in model_.modules()] == classes
    assert all(torch.equal(t, before[name]) for name, t in model_.state_dict().items())


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("plan_fold", "fold_norms, strict")])
@pytest.mark.parametrize("bad", BAD)
def test_such_a_check_is_refused(verb: str, bad: str) -> None:
    with pytest.raises(ValueError, match="on check the model returns"):
        VERBS[verb](model(), draw(4, C), check=BAD[bad][0])


def test_one_such_example_among_several_is_named() -> None:
    with pytest.raises(ValueError, match="on input 2 of 3 the model returns only NaN"):
        fold_norms(model(), [draw(4, C), draw(4, C) * torch.nan, draw(4, C)])


def test_a_model_that_returns_no_floats_is_told_to_name_what_matters() -> None:
    names_one = Net(lambda m, x: m.fc(m.norm(x)).argmax(-1), norm=RepBN(C), fc=nn.Linear(C, D))
    with pytest.raises(ValueError, match=r"no floating tensor.*outputs="):
        fold_norms(ready(names_one), draw(4, C))


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda y: y.to_sparse(),
    "compressed": lambda y: y.to_sparse_csr(),
    "complex and sparse": lambda y: torch.complex(y, y).to_sparse(),
    "nested": lambda y: torch.nested.nested_tensor(list(y)),
    "jagged": lambda y: torch.nested.nested_tensor(list(y), layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_numbers_count_in_whatever_memory_the_model_returns_them(kind: str) -> None:
    returns = Net(lambda m, x: UNUSUAL[kind](m.fc(m.norm(x))), norm=RepBN(C), fc=nn.Linear(C, D))
    result = fold_norms(ready(returns), draw(4, C))
    assert [norm.status for norm in result.norms] == ["forward"]
    assert result.max_rel_error < 1e-12
    with pytest.raises(ValueError, match="only NaN and infinities"):
        fold_norms(ready(returns), draw(4, C) * torch.nan)


def test_rows_of_padding_that_are_not_finite_hide_nothing_of_the_others() -> None:
    class Liar(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.abs().mean(-1, keepdim=True)

        def fold_affine(self) -> tuple[Tensor, Tensor, int]:
            return torch.ones(C), torch.zeros(C), -1

    x = draw(4, C)
    x[1] = torch.nan
    mine = ready(nn.Sequential(nn.Linear(C, C), Liar(), nn.Linear(C, D)))
    assert [norm.status for norm in fold_norms(mine, x).norms] == ["kept"]


@pytest.mark.filterwarnings("ignore")  # torch says that nested tensors may change
@pytest.mark.parametrize("where", ["a norm", "an attention"])
def test_a_nested_example_that_does_not_run_is_told_to_be_padded(where: str) -> None:
    layer = nn.TransformerEncoderLayer(C, 2, C, batch_first=True)
    net = nn.Sequential(nn.Linear(C, C), RepBN(C), layer if where == "an attention" else nn.Identity()).eval()
    example = torch.nested.nested_tensor([torch.randn(3, C), torch.randn(5, C)])
    with pytest.raises(ValueError, match=r"holds a nested tensor.*Pass a padded tensor.*padding mask") as raised:
        fold_norms(net, example)
    assert "get_fastpath_enabled" not in str(raised.value)
