"""Lam as a function of the step: its ends, its shape, its order, and what is refused."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from stabnorm.switch.schedules import constant, cosine, linear, make_schedule, schedule_end

NAMED: dict[str, Callable[..., float]] = {"linear": linear, "cosine": cosine, "constant": constant}
ORDERS = ("together", "shallow_first", "deep_first")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(("total", "start", "fraction"), [(100, 0, 0.8), (37, 5, 0.6), (7, 3, 0.5), (1000, 0, 1.0)])
def test_lam_is_1_before_the_start_and_exactly_0_from_the_end_and_never_rises(
    name: str, order: str, total: int, start: int, fraction: float
) -> None:
    layers = 5
    for layer in range(layers):
        options: dict[str, Any] = {"start": start, "fraction": fraction, "order": order}
        lams = [NAMED[name](step, total, layer, layers, **options) for step in range(total + 3)]
        assert all(lam == 1.0 for lam in lams[:start])
        assert all(lam == 0.0 for lam in lams[start + max(1, round(fraction * total)) :])
        assert all(0 <= after <= before for before, after in itertools.pairwise(lams))


def test_linear_is_the_published_countdown() -> None:
    countdown = [1 - done / 4 for done in range(4)] + [0.0, 0.0]  # arXiv:2405.11582, T = 4
    assert [linear(step, 5) for step in range(6)] == countdown


def test_cosine_is_half_a_cosine() -> None:
    for step in range(2, 10):
        share = (step - 2) / 8
        assert cosine(step, 10, start=2) == pytest.approx((1 + math.cos(math.pi * share)) / 2, abs=1e-15)


def test_constant_has_no_transition() -> None:
    assert [constant(step, 10, start=3, fraction=0.5) for step in range(5)] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_layers_one_after_the_other_take_half_the_schedule_each() -> None:
    for layer, (begin, end) in enumerate([(0, 40), (20, 60), (40, 80)]):
        for step in range(101):
            wanted = min(max(1 - (step - begin) / (end - begin), 0), 1)
            assert linear(step, 100, layer, 3, order="shallow_first") == pytest.approx(wanted, abs=1e-12)
            assert linear(step, 100, 2 - layer, 3, order="deep_first") == pytest.approx(wanted, abs=1e-12)


def test_one_layer_alone_takes_the_whole_schedule_in_any_order() -> None:
    for step in range(12):
        assert linear(step, 10, order="deep_first") == linear(step, 10)


def test_a_made_schedule_gives_every_layer_what_the_function_gives() -> None:
    made = make_schedule("cosine", 50, 4, start=3, fraction=0.9, order="deep_first")
    for step in range(51):
        wanted = [cosine(step, 50, layer, 4, start=3, fraction=0.9, order="deep_first") for layer in range(4)]
        assert made(step) == wanted


def test_a_users_function_is_asked_for_the_step() -> None:
    made = make_schedule(lambda step: max(0.0, 1 - (step / 9) ** 2), 10, 3)
    assert made(3) == [1 - 1 / 9] * 3
    assert made(10) == [0.0] * 3


def test_a_function_that_ends_above_0_or_leaves_the_shares_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gives lam=0.5 at step 10, where the training ends, and it has to be 0"):
        make_schedule(lambda step: 0.5, 10)
    for wrong in (1.5, -0.1, math.nan):
        made = make_schedule(lambda step, wrong=wrong: wrong if step == 3 else 0.0, 10)  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"gives lam=.* at step 3. lam is a share, from 0 to 1"):
            made(3)


@pytest.mark.parametrize("fraction", [0, -0.2, 1.01, math.nan, math.inf])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"fraction={fraction} is out of range. Give a number above 0, and 1 at most"):
        make_schedule("linear", 100, fraction=fraction)


def test_a_schedule_longer_than_the_training_is_refused_with_both_ends() -> None:
    with pytest.raises(ValueError, match=r"ends at step 110 \(start=30, and then 0.8 of 100 steps\).*at step 100"):
        make_schedule("linear", 100, start=30)
    assert schedule_end(100, start=20) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linaer"}, r"schedule='linaer' is unknown. Choose one of 'linear', 'cosine', 'constant', 'adap"),
        ({"start": -1}, r"start=-1 is out of range. Give a whole number of 0 or more"),
        ({"order": "deep"}, r"order='deep' is unknown. Choose one of 'together', 'shallow_first', 'deep_first'"),
    ],
)
def test_other_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(**{"schedule": "linear", "total": 100, **options})
    with pytest.raises(ValueError, match="layer=3 is not one of 3 layers"):
        linear(0, 10, 3, 3)


def test_schedules_and_gate_load_without_torch() -> None:
    code = "import sys, stabnorm.switch.schedules, stabnorm.switch.gate; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
