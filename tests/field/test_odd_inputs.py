"""Whatever is odd about an input is said where it comes in, in our words: the argument, the value, what to do."""

import copy
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stabnorm
from stabnorm import StabNormError
from stabnorm.callbacks._masks import BatchMask
from tests.field.odd_inputs import DOORS, X, converted, plain, verdicts


@pytest.mark.parametrize("name", DOORS)
def test_a_door_takes_what_is_right_and_refuses_in_clear_words_what_is_odd(name: str) -> None:
    DOORS[name].call(**DOORS[name].good())
    unclear = [(argument, value, what) for argument, value, what in verdicts(name) if what != "clear"]
    assert unclear == []


RUNS = ("convert_norms, fit", "fold_norms", "guard_folds", "remove_norms", "recalibrate_norms", "measure_norms")


@pytest.mark.parametrize("name", [*RUNS, "fold_gains", "to_pre_rms", "plan_fold", "Repair", "fit_norms"])
def test_a_model_without_numbers_is_refused_by_whatever_runs_it(name: str) -> None:
    good = DOORS[name].good()
    on_meta = copy.deepcopy(good.get("model") or converted()).to("meta")
    with pytest.raises(StabNormError, match="of the model is on the meta device, where there are no numbers to"):
        DOORS[name].call(**good | {"model": on_meta})


@pytest.mark.parametrize("name", RUNS)
def test_a_lazy_model_is_told_to_run_first(name: str) -> None:
    lazy = nn.Sequential(nn.LazyLinear(8), nn.LayerNorm(8), nn.Linear(8, 2))
    with pytest.raises(StabNormError, match="does not know its size yet, so there are no numbers to"):
        DOORS[name].call(**DOORS[name].good() | {"model": lazy})


def test_a_model_on_the_meta_device_is_found_and_converted_but_not_watched_or_switched() -> None:
    model = plain().to("meta")
    monitor = stabnorm.StabilityMonitor(model)
    with pytest.raises(StabNormError, match="no numbers to watch"):
        monitor.attach()
    assert not model[1]._forward_pre_hooks  # type: ignore[index,union-attr]
    assert stabnorm.convert_norms(model).converted == ["1"]
    with pytest.raises(StabNormError, match="no numbers to switch"):
        stabnorm.ProgressiveSwitch(model, 10)


def test_a_refused_state_changes_nothing() -> None:
    with stabnorm.StabilityMonitor(model := plain()) as monitor:
        model(X)
        monitor.step()
        for state in ({}, {"steps_done": 7}, None):
            with pytest.raises((TypeError, ValueError), match="the state"):
                monitor.load_state_dict(state)  # type: ignore[arg-type]
    assert monitor.steps_done == 1
    assert monitor.history_steps().tolist() == [0]


# --- what is chosen from a list ---

package: Any = stabnorm  # the slips are slips for a type checker, too

SLIPS: dict[str, tuple[Callable[[], Any], str]] = {
    "a target": (lambda: package.convert_norms(plain(), to="PRepBM"), "prepbn"),
    "a schedule": (lambda: package.ProgressiveSwitch(converted(), 10, "cosin"), "cosine"),
    "an order": (lambda: package.ProgressiveSwitch(converted(), 10, "linear", order="deepfirst"), "deep_first"),
    "an option": (lambda: package.convert_norms(plain(), momentm=0.2), "momentum"),
    "an option of a module": (lambda: package.nn.PRepBN(4, filtratoin=None), "filtration"),
    "a preset": (lambda: package.StabilityMonitor(plain(), "ful"), "full"),
    "a statistic": (lambda: package.StabilityMonitor(plain(), ["a_max"]), "amax"),
    "a companion": (lambda: package.StabilityMonitor(plain(), companions=["weigths"]), "weights"),
    "a kind": (lambda: package.register_norm(nn.Linear, "rmsnorm"), "rms"),
    "a variant": (lambda: package.nn.RepBN(4, init="visoin"), "vision"),
    "a guard": (lambda: DOORS["guard_folds"].call(**DOORS["guard_folds"].good() | {"guard": "rase"}), "raise"),
    "a tied weight": (lambda: package.fold_norms(plain().eval(), X, tied="unite"), "untie"),
    "a module": (lambda: package.companions.OutputCompanion(layer="hed").watch(named()), "head"),
    "a kernel": (lambda: package.ops.use_kernels("referenz"), "reference"),
    "a part of the package": (lambda: package.convert_norm, "convert_norms"),
}


def named() -> nn.Module:
    """A model with named parts."""
    model = nn.Module()
    model.body, model.head = nn.LayerNorm(4), nn.Linear(4, 2)
    return model


@pytest.mark.parametrize("what", SLIPS)
def test_a_slip_in_a_name_is_answered_with_the_nearest_one(what: str) -> None:
    call, meant = SLIPS[what]
    with pytest.raises((ValueError, TypeError, AttributeError), match=rf"[Dd]id you mean '{meant}'\?"):
        call()


# --- an argument that nothing would follow ---


@pytest.mark.parametrize("schedule", ["adaptive", lambda step: 0.0])
def test_an_order_that_the_schedule_would_not_follow_is_refused(schedule: Any) -> None:
    with pytest.raises(ValueError, match="order='shallow_first' would not be followed"):
        stabnorm.ProgressiveSwitch(converted(), 10, schedule, order="shallow_first")
    callback = stabnorm.callbacks.ProgressiveNormCallback
    with pytest.raises(ValueError, match="order='shallow_first' would not be followed"):
        callback(schedule=schedule, order="shallow_first")


@pytest.mark.parametrize("options", [{"start": 5}, {"fraction": 0.5}, {"order": "deep_first", "schedule": "linear"}])
def test_a_target_without_lam_takes_no_course_of_lam(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="say how lam moves, and to='unified' has none"):
        stabnorm.callbacks.ProgressiveNormCallback(to="unified", **options)


@pytest.mark.parametrize("options", [{"start": 5}, {"fraction": 0.5}])
def test_a_function_of_the_step_takes_no_span(options: dict[str, Any]) -> None:
    for make in (functools.partial(stabnorm.ProgressiveSwitch, converted(), 10), callback_of):
        with pytest.raises(ValueError, match="would not be followed: a function of the step says itself when"):
            make(schedule=lambda step: 0.0, **options)


def callback_of(**options: Any) -> Any:
    return stabnorm.callbacks.ProgressiveNormCallback(**options)


def test_batches_that_nothing_would_be_judged_on_are_refused() -> None:
    with pytest.raises(ValueError, match="held_out= would not be used"):
        stabnorm.remove_norms(plain(), [X], held_out=[X])


# --- an inverted mask ---


@pytest.mark.parametrize(("inverted", "share"), [(True, "75 %"), (False, "")])
def test_a_mask_that_leaves_out_most_of_the_first_batch_is_asked_about_once(
    inverted: bool, share: str, caplog: pytest.LogCaptureFixture
) -> None:
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]], dtype=torch.bool)
    mask = BatchMask("padding")
    with caplog.at_level(logging.WARNING, "stabnorm"):
        for _ in range(3):
            mask.enter({"padding": ~valid if inverted else valid})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mask.leave()
    assert len(caplog.records) == int(inverted)
    assert share in caplog.text
    assert ("mask='padding' leaves out" in caplog.text) == inverted


def test_norm_options_are_checked_when_the_callback_is_built() -> None:
    callback = stabnorm.callbacks.ProgressiveNormCallback
    assert callback(to="power", norm_options={"groups": 3}).norm_options == {"groups": 3}
    assert callback(norm_options={"init": "fit", "loader": [X]}).norm_options["init"] == "fit"
    with pytest.raises(ValueError, match="init='fit' needs batches"):
        callback(norm_options={"init": "fit"})
    with pytest.raises(ValueError, match="momentum=5 is out of range"):
        callback(norm_options={"momentum": 5})
