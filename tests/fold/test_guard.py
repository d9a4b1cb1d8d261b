"""The guard reports inputs beyond the calibration data, and nothing else."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm import StabNormError, fold_norms, guard_folds
from stabnorm.nn import RepBN
from tests.families import FAMILIES
from tests.fold.nets import Net, draw, ready
from tests.fold.test_families import ready as ready_family

FAMILY = FAMILIES["vit, class token"]


def folded() -> nn.Module:
    return fold_norms(ready_family(FAMILY, center=True), tuple(FAMILY.example())).model


def calibration() -> list[Any]:
    return [(FAMILY.example(seed)[0][0], "targets") for seed in range(6)]


def test_data_like_the_calibration_data_are_not_reported_and_outputs_do_not_change() -> None:
    model = folded()
    plain = copy.deepcopy(model)
    (x,), _ = FAMILY.example(8)
    with guard_folds(model, calibration(), "raise") as guard, torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert len(guard.bounds) == FAMILY.norms
        assert all(bound > 0 for bound in guard.bounds.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("fault", [100.0, float("nan"), float("inf")])
def test_one_extreme_row_is_reported_with_the_site_that_is_furthest_off(fault: float) -> None:
    model = folded()
    (x,), _ = FAMILY.example(8)
    x[1] *= fault
    with guard_folds(model, calibration()), pytest.warns(UserWarning, match=r"of 5 folded norms.*'blocks"):
        model(x)


def test_inputs_by_keyword_are_watched_and_an_empty_one_is_nothing_to_report() -> None:
    model = fold_norms(
        ready(Net(lambda m, x: m.fc(m.norm(mask=x[..., 0] > 0, x=x)), norm=RepBN(4), fc=nn.Linear(4, 2))), draw(3, 4)
    ).model
    with guard_folds(model, [draw(3, 4), draw(0, 4)], "raise") as guard:
        assert guard.bounds == {"norm": pytest.approx(float(draw(3, 4).abs().max()))}
        assert model(draw(0, 4)).shape == (0, 2)
        with pytest.raises(StabNormError, match="'norm'"):
            model(9 * draw(3, 4))


def test_the_margin_itself_is_not_beyond_the_margin() -> None:
    model = fold_norms(nn.Sequential(RepBN(4), nn.Linear(4, 2)).eval(), draw(8, 4).float()).model
    with guard_folds(model, [torch.ones(8, 4)], "raise", margin=4) as guard:
        model(torch.full((1, 4), -4.0))
        with pytest.raises(StabNormError, match=r"read 4\.01, and its bound is 1"):
            model(torch.full((1, 4), -4.01))
        assert guard.bounds == {"0": 1.0}


def test_only_the_forward_it_happens_in_is_reported() -> None:
    model = folded()
    (x,), _ = FAMILY.example(8)
    with guard_folds(model, calibration(), "raise"):
        with pytest.raises(StabNormError, match="distrust this output"):
            model(100 * x)
        model(x)


def test_a_bound_is_the_largest_value_read() -> None:
    model = fold_norms(ready(nn.Sequential(RepBN(4), nn.Linear(4, 2))), draw(3, 4)).model
    inputs = [draw(3, 4, seed=1), 3 * draw(2, 4, seed=2)]
    guard = guard_folds(model, inputs, margin=1.0)
    assert guard.bounds == {"0": pytest.approx(float(max(x.abs().max() for x in inputs)))}
    guard.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(1000 * inputs[0])


def test_what_cannot_be_guarded_is_said() -> None:
    with pytest.raises(ValueError, match="no folded norm"):
        guard_folds(nn.Sequential(nn.Linear(2, 2)), [])
    model = folded()
    with pytest.raises(ValueError, match="no finite bound for 'blocks"):
        guard_folds(model, [])
    with pytest.raises(ValueError, match="guard='shout'"):
        guard_folds(model, calibration(), "shout")  # type: ignore[arg-type]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
