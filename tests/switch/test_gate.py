"""The adaptive gate against its rule written out once more, layer by layer and step by step."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

from stabnorm.errors import StabNormError
from stabnorm.switch.gate import MEASURE_EVERY, AffineGate
from stabnorm.switch.schedules import linear


def by_the_rule(residuals: list[float], total: int, start: int = 0, fraction: float = 0.8) -> tuple[list[float], str]:
    """The rule for one layer, in plain Python: lam at every step, and the state it ends in."""
    end = start + round(fraction * total)
    whole = (end - start) / 0.8
    lam, average, state, lams = 1.0, math.nan, "wait", []
    for step in range(total + 1):
        lams.append(lam)
        if step % 4 == 0 and math.isfinite(residuals[step]):
            average = residuals[step] if math.isnan(average) else 0.9 * average + 0.1 * residuals[step]
        share = (step - start) / whole
        if share >= 0.06 and step < end:
            if state == "wait":
                if average < 0.30:
                    state = "run"
                elif share > 0.45:
                    state = "refused"
            elif state in ("run", "hold"):
                if average > 0.50 and share <= 0.45:
                    state = "hold"
                elif average > 0.50 and share < 0.65:
                    state = "refused"
                else:
                    state = "run"
        if state == "run" and step < end:
            lam -= lam / (end - step)
        if state == "refused":
            lam = min(1.0, lam + 3 * 2 / (end - start))
    return lams, state


def walk(seed: int, total: int) -> list[float]:
    """Residuals that wander over all thresholds; now and then a layer does not run."""
    draw = random.Random(seed)
    level, slope = draw.uniform(0, 1), draw.uniform(-1.5, 1.5) / total
    lams = []
    for step in range(total + 1):
        if step % (total // 5) == 0:
            slope = draw.uniform(-4, 4) / total
        level = min(max(level + slope, 0.0), 1.0)
        lams.append(math.nan if draw.random() < 0.05 else min(max(level + draw.gauss(0, 0.05), 0.0), 1.0))
    return lams


@pytest.mark.parametrize(("total", "start", "fraction"), [(400, 0, 0.8), (333, 40, 0.6), (200, 0, 1.0)])
def test_each_layer_follows_the_rule(total: int, start: int, fraction: float) -> None:
    layers = 200
    series = [walk(seed, total) for seed in range(layers)]
    gate = AffineGate([str(i) for i in range(layers)], total, start=start, fraction=fraction)
    got = []
    for step in range(total + 1):
        got.append(gate.advance(step))
        if step % MEASURE_EVERY == 0:
            gate.observe(step, [values[step] for values in series])
    wanted = [by_the_rule(values, total, start, fraction) for values in series]
    np.testing.assert_allclose(np.array(got).T, [lams for lams, _ in wanted], rtol=0, atol=1e-12)
    assert gate.states == [state for _, state in wanted]
    seen = {change.state for change in gate.changes}
    assert seen == {"run", "hold", "refused"}  # the walks go everywhere
    switched = {state == "refused" for _, state in wanted}
    assert switched == {True, False}
    assert set(gate.lam) == {0.0, 1.0}


def run(gate: AffineGate, residuals: list[float], steps: range) -> list[list[float]]:
    lams = []
    for step in steps:
        lams.append(gate.advance(step))
        if step % MEASURE_EVERY == 0:
            gate.observe(step, residuals)
    return lams


def test_on_plain_data_it_is_the_linear_schedule_from_the_end_of_the_warm_up() -> None:
    total = 500
    lams = run(AffineGate(["a", "b"], total), [0.04, 0.13], range(total + 1))
    for step, lam in enumerate(lams):
        wanted = linear(step, total, start=30, fraction=0.74)  # 0.06 and 0.80 of 500
        assert lam == pytest.approx([wanted, wanted], abs=1e-12)


def test_a_refused_layer_says_why_with_numbers() -> None:
    gate = AffineGate(["blocks.0.norm1", "blocks.1.norm1", "head", "idle"], 1000)
    run(gate, [0.62, 0.1, 0.31, math.nan], range(1001))
    assert gate.states == ["refused", "run", "refused", "refused"]
    assert gate.reasons == [
        "affine residual 0.62 stayed above 0.30 until step 451 of 1000: keeps its norm",
        "affine residual 0.10 fell below 0.30 by step 60 of 1000",
        "affine residual 0.31 stayed above 0.30 until step 451 of 1000: keeps its norm",
        "its affine residual was never measured until step 451 of 1000: keeps its norm",
    ]
    assert gate.lam == [1.0, 0.0, 1.0, 1.0]


def test_a_layer_that_gets_worse_waits_goes_on_or_goes_back() -> None:
    def residual(step: int) -> list[float]:
        return [0.1 if step < 200 or step >= 300 else 0.9, 0.1 if step < 520 else 0.9]

    gate = AffineGate(["waits", "goes back"], 1000)
    lams = []
    for step in range(1001):
        lams.append(gate.advance(step))
        gate.observe(step, residual(step))
    waits, back = zip(*lams, strict=True)
    assert len(set(waits[210:300])) == 1
    assert waits[800] == 0.0
    assert min(back) == pytest.approx(1 - (526 - 60) / (800 - 60))  # seven residuals of 0.9 take the average there
    assert back[1000] == 1.0
    assert max(b - a for a, b in itertools.pairwise(back)) == pytest.approx(6 / 800)
    changes = [(change.layer, change.state) for change in gate.changes]
    assert changes == [
        ("waits", "run"),
        ("goes back", "run"),
        ("waits", "hold"),
        ("waits", "run"),
        ("goes back", "refused"),
    ]
    assert gate.changes[2].reason == (
        f"affine residual {0.9 - 0.8 * 0.9**7:.2f} rose above 0.50 at step 206 of 1000: waits at lam = {waits[206]:.2f}"
    )


def test_asked_twice_or_after_a_gap_it_gives_the_same() -> None:
    one, other = AffineGate(["a"], 100), AffineGate(["a"], 100)
    for gate in (one, other):
        gate.observe(0, [0.1])
    for step in range(41):
        one.advance(step)
        assert one.advance(step) == one.lam
    assert other.advance(40) == one.lam
    with pytest.raises(ValueError, match="the gate is at step 40 and does not go back to 39"):
        one.advance(39)


@pytest.mark.parametrize("stop", [10, 100, 205, 390])
def test_resumed_from_plain_containers_it_goes_on_to_the_same_numbers(stop: int) -> None:
    total, layers = 400, 30
    series = [walk(100 + seed, total) for seed in range(layers)]
    names = [str(i) for i in range(layers)]

    def go(gate: AffineGate, steps: range) -> list[list[float]]:
        lams = []
        for step in steps:
            lams.append(gate.advance(step))
            gate.observe(step, [values[step] for values in series])
        return lams

    whole = AffineGate(names, total)
    wanted = go(whole, range(total + 1))
    first, second = AffineGate(names, total), AffineGate(names, total)
    go(first, range(stop))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))  # JSON knows plain containers only
    assert go(second, range(stop, total + 1)) == wanted[stop:]
    assert second.reasons == whole.reasons


def test_a_state_of_other_layers_is_refused_and_changes_nothing() -> None:
    gate = AffineGate(["a", "b"], 100)
    saved = AffineGate(["a", "c"], 100).state_dict()
    with pytest.raises(StabNormError, match=r"it has \['c'\], and lacks \['b'\]"):
        gate.load_state_dict(saved)
    assert gate.lam == [1.0, 1.0]


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"on=0.6, off=0.5: a residual lies in \[0, 1\]"):
        AffineGate(["a"], 100, on=0.6)
    with pytest.raises(ValueError, match="are shares of the training"):
        AffineGate(["a"], 100, last_start=0.7)
    with pytest.raises(ValueError, match=r"fraction=1\.5 is out of range"):
        AffineGate(["a"], 100, fraction=1.5)
    with pytest.raises(ValueError, match=r"step 0 brings residuals of shape \(1,\) for 2 layers"):
        AffineGate(["a", "b"], 100).observe(0, [0.1])


def test_a_tensor_of_residuals_will_do() -> None:
    gate = AffineGate(["a"], 100)
    gate.observe(0, torch.tensor([0.25]).numpy())
    assert gate.residuals == [0.25]
