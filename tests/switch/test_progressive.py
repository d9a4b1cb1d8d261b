"""The switch in a plain training loop: the sequence of lam, the gate with delayed residuals, resume, and messages."""

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import StabilityMonitor, StabNormError, convert_norms
from stabnorm.nn import PRepBN, UnifiedNorm
from stabnorm.switch.gate import AffineGate, Change
from stabnorm.switch.lam import progressive_norms
from stabnorm.switch.progressive import ProgressiveSwitch
from tests.watchers import watchers


class Two(nn.Module):
    """One norm whose input is plain, and one whose tokens have scales from exp(-2 spread) to exp(2 spread)."""

    spread = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.heavy = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        gain = torch.exp(self.spread * torch.linspace(-2, 2, x.shape[0]))[:, None]
        y: Tensor = self.plain(x) + self.heavy(gain * x)
        return y


def two() -> Two:
    model = Two()
    convert_norms(model)
    return model


def batch(step: int, part: int = 0) -> tuple[Tensor, Tensor]:
    x, dy = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(97 * step + part))
    return x + 0.5 * torch.arange(16), dy


def train(
    model: Any,
    switch: ProgressiveSwitch,
    steps: range,
    accumulate: int = 1,
    monitor: StabilityMonitor | None = None,
    spread: Callable[[int], float] = lambda step: 1.5,
) -> list[list[float]]:
    """The lam of every step, as the forwards have it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lams = []
    for step in steps:
        seen = set()
        model.spread = spread(step)
        for part in range(accumulate):
            switch.begin()
            x, dy = batch(step, part)
            model(x).backward(dy)
            seen.add(tuple(float(norm.lam) for norm in switch.norms.values()))
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step()
        switch.step()
        (lam,) = seen  # one for all micro-batches
        lams.append(list(lam))
    return lams


@pytest.mark.parametrize("accumulate", [1, 4])
def test_lam_follows_the_optimizer_steps(accumulate: int) -> None:
    model = two()
    switch = ProgressiveSwitch(model, 20, "linear", start=4, fraction=0.5, order="deep_first")
    lams = train(model, switch, range(20), accumulate)
    for step, lam in enumerate(lams):
        wanted = [min(max(1 - (step - begin) / 5, 0), 1) for begin in (9, 4)]
        assert lam == pytest.approx(wanted, abs=1e-7)
    assert [int(norm.rep.step) for norm in switch.norms.values()] == [20, 20]
    assert [int(norm.rep.progress[0]) for norm in switch.norms.values()] == [20 * accumulate] * 2


def late_trouble(step: int) -> float:
    """Plain at first, and heavy-tailed from the middle on: the layer runs, and then goes back."""
    return 1.5 if step >= 88 else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_the_gate_is_fed_every_fourth_step_and_decides_four_steps_later(shared: bool) -> None:
    model, total = two(), 200
    watch = StabilityMonitor(model, ["affine_residual"], gradients=False)
    switch = ProgressiveSwitch(model, total, "adaptive", monitor=watch if shared else None)
    with watch:
        lams = train(model, switch, range(total), monitor=watch, spread=late_trouble)
    assert watchers(model.plain) == 1  # the gap's, until it is closed
    residuals = watch.history()["affine_residual"].double()
    gate = AffineGate(switch.layers, total)
    for step in range(total):
        if step >= 4 and step % 4 == 0:
            gate.observe(step - 4, residuals[step - 4].numpy())
        assert lams[step] == pytest.approx(gate.advance(step), abs=1e-7)
    assert residuals[:, 0].max() < 0.25
    assert residuals[0, 1] < 0.25
    assert residuals[-1, 1] > 0.7
    assert min(lam for _, lam in lams) < 0.35
    assert switch.lam == [0.0, 1.0]
    assert switch.kept == {"heavy": gate.reasons[1]}


def test_with_one_monitor_or_its_own_the_decisions_are_the_same() -> None:
    values = []
    for shared in (True, False):
        torch.manual_seed(1)
        model = two()
        watch = StabilityMonitor(model, gradients=False) if shared else None
        if watch is not None:
            watch.attach()
        switch = ProgressiveSwitch(model, 60, "adaptive", monitor=watch)
        values.append((train(model, switch, range(60), monitor=watch), switch.gate.residuals))  # type: ignore[union-attr]
        switch.close()
        assert watchers(model.plain) == shared
    assert values[0] == values[1]


def test_a_monitor_that_lacks_a_layer_or_the_statistic_is_not_relied_on() -> None:
    for options in ({"include": "plain"}, {"preset": "economy"}):
        model = two()
        with StabilityMonitor(model, gradients=False, **options) as watch:  # type: ignore[arg-type]
            switch = ProgressiveSwitch(model, 40, "adaptive", monitor=watch)
            train(model, switch, range(40), monitor=watch)
            assert switch.gate is not None
            assert not any(residual != residual for residual in switch.gate.residuals)


@functools.cache
def uninterrupted(schedule: str, total: int) -> tuple[Two, ProgressiveSwitch, list[list[float]]]:
    model = two()
    switch = ProgressiveSwitch(model, total, schedule)
    return model, switch, train(model, switch, range(total), spread=late_trouble)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "stop"),
    [("linear", 17), ("linear", 190), *(("adaptive", stop) for stop in (4, 11, 118, 122, 126, 130))],
)
def test_resumed_from_plain_containers_it_goes_on_with_the_same_lam(schedule: str, stop: int) -> None:
    total = 200
    whole_model, switch, whole = uninterrupted(schedule, total)
    resumed_model = two()
    first = ProgressiveSwitch(resumed_model, total, schedule)
    train(resumed_model, first, range(stop), spread=late_trouble)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    assert first.state_dict() == state  # saved after the training, it still goes on from there
    fresh = two()
    fresh.load_state_dict(resumed_model.state_dict())
    second = ProgressiveSwitch(fresh, total, schedule)
    second.load_state_dict(state)
    assert train(fresh, second, range(stop, total), spread=late_trouble) == whole[stop:]
    assert second.kept == switch.kept
    if switch.gate is not None and second.gate is not None:
        assert second.gate.residuals == switch.gate.residuals  # each of them arrived, and once
    for a, b in zip(fresh.parameters(), whole_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_layer_that_was_switched_before_stays_switched() -> None:
    model = two()
    norms = progressive_norms(model)
    norms["heavy"].lam.zero_()
    norms["plain"].lam.fill_(0.6)
    switch = ProgressiveSwitch(model, 10, "linear")
    lams = train(model, switch, range(10))
    assert [lam[1] for lam in lams] == [0.0] * 10
    assert [lam[0] for lam in lams][:5] == pytest.approx([0.6, 0.6, 0.6, 0.6, 0.5], abs=1e-7)


class Recorder:
    def __init__(self) -> None:
        self.rows: list[tuple[int, list[float], Tensor | None]] = []
        self.changes: list[tuple[int, Change]] = []

    def add(self, row: int, lam: list[float], gap: Tensor | None) -> None:
        self.rows.append((row, lam, gap))

    def change(self, row: int, change: Change) -> None:
        self.changes.append((row, change))


def test_lam_gap_and_decisions_are_told() -> None:
    model = two()
    switch = ProgressiveSwitch(model, 60, "adaptive")
    switch.recorder = recorder = Recorder()
    lams = train(model, switch, range(60))
    assert [row for row, _, _ in recorder.rows] == list(range(60))
    assert [lam for _, lam, _ in recorder.rows] == [pytest.approx(lam, abs=1e-7) for lam in lams]
    assert [row for row, _, gap in recorder.rows if gap is not None] == list(range(0, 60, 4))
    first = recorder.rows[0][2]
    assert first is not None
    x, _ = batch(0)
    fresh = two()
    of_norm, of_rep, _ = fresh.plain.branches(x)  # type: ignore[operator]
    torch.testing.assert_close(first[0], (of_norm - of_rep).norm() / of_norm.norm())
    assert [(change.layer, change.state) for _, change in recorder.changes] == [("plain", "run"), ("heavy", "refused")]


def test_the_summary_names_what_was_kept_and_why() -> None:
    model = two()
    switch = ProgressiveSwitch(model, 100, "adaptive")
    train(model, switch, range(100))
    assert switch.gate is not None
    assert switch.summary().splitlines() == [
        "1 of 2 layers switched to RepBN, which is affine in eval",
        f"  heavy  keeps LayerNorm  affine residual {switch.gate.residuals[1]:.2f} stayed above 0.30 until step 46 of "
        "100: keeps its norm",
    ]


def test_what_is_switched_computes_its_norm_no_more_though_another_layer_keeps_its_own() -> None:
    model = two()
    switch = ProgressiveSwitch(model, 100, "adaptive")
    flags = []
    for step in range(100):
        train(model, switch, range(step, step + 1))
        flags.append((switch.norms["plain"].leave_out_norm, switch.norms["heavy"].leave_out_norm))
    changes = [step for step in range(1, 100) if flags[step] != flags[step - 1]]
    assert flags[0] == (False, False)
    assert flags[-1] == (True, False)
    assert changes == [79]  # once, where the switch is over: each change is a compilation


def test_the_summary_says_when_the_training_ended_early() -> None:
    model = two()
    switch = ProgressiveSwitch(model, 10, "linear")
    train(model, switch, range(4))
    assert switch.summary().splitlines() == [
        "0 of 2 layers switched to RepBN, which is affine in eval",
        "  plain  lam = 0.5  the training ended at step 4, before the switch was over",
        "  heavy  lam = 0.5  the training ended at step 4, before the switch was over",
    ]


def test_norms_without_lam_are_told_their_steps() -> None:
    model = nn.Sequential(UnifiedNorm(16, warmup_steps=5))
    switch = ProgressiveSwitch(model, 10, "linear")
    train(model, switch, range(7), accumulate=3)
    assert model[0].step == 7
    assert switch.lam == []
    model(torch.randn(4, 16))
    assert model[0].step == 7


def test_after_the_switch_the_norms_count_their_own_forwards_again() -> None:
    model = nn.Sequential(UnifiedNorm(16, warmup_steps=5))
    switch = ProgressiveSwitch(model, 10, "linear")
    train(model, switch, range(7), accumulate=3)
    switch.close()
    for _ in range(2):
        model(torch.randn(4, 16))
    assert model[0].step == 9


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(StabNormError, match=r"Two has no norm to switch\. Convert it first"):
        ProgressiveSwitch(Two(), 10, "linear")
    with pytest.raises(ValueError, match=r"the schedule ends at step 13 .* and the training already at step 10"):
        ProgressiveSwitch(two(), 10, "linear", start=5)
    saved = ProgressiveSwitch(two(), 10, "linear").state_dict()
    other: Any = ProgressiveSwitch(nn.Sequential(PRepBN(16)), 10, "linear")
    with pytest.raises(StabNormError, match=r"it has \['heavy', 'plain'\], and lacks \['0'\]"):
        other.load_state_dict(saved)
    with pytest.raises(StabNormError, match="only this run's is adaptive"):
        ProgressiveSwitch(two(), 10, "adaptive").load_state_dict(saved)


def test_rep_takes_over_what_the_norm_has_become_as_lam_leaves_one_and_never_again() -> None:
    model = two()
    norms: list[Any] = [norm for norm in model.modules() if isinstance(norm, PRepBN)]
    switch = ProgressiveSwitch(model, 10, "linear", start=3, fraction=0.5)
    for step in range(6):
        for norm in norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        then = [norm.weight.detach().clone() for norm in norms]
        before = [norm.rep.weight.detach().clone() for norm in norms]
        switch.begin()
        switch.step()
        leaves = step == 3  # lam is below 1 for the first time after the fourth step
        assert (switch.lam[0] < 1) == (step >= 3)
        for norm, gain, old in zip(norms, then, before, strict=True):
            assert torch.equal(norm.rep.weight, gain if leaves else old)
            assert norm.rep.eta == 0


def test_resumed_past_the_beginning_rep_keeps_what_it_has_learned() -> None:
    model = two()
    switch = ProgressiveSwitch(model, 10, "linear")
    for _ in range(3):
        switch.begin()
        switch.step()
    for norm in progressive_norms(model).values():
        nn.init.normal_(norm.rep.weight)
    saved, weights = json.loads(json.dumps(switch.state_dict())), copy.deepcopy(model.state_dict())
    fresh = two()
    fresh.load_state_dict(weights)
    resumed = ProgressiveSwitch(fresh, 10, "linear")
    resumed.load_state_dict(saved)
    resumed.begin()
    resumed.step()
    for name, norm in progressive_norms(fresh).items():
        assert torch.equal(norm.rep.weight, weights[f"{name}.rep.weight"])
