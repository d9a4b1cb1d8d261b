"""A state with damaged values is refused in one sentence, and the object continues from the state that it had."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm import ProgressiveSwitch, StabilityMonitor, convert_norms
from stabnorm.errors import StabNormError
from stabnorm.monitor.detect import RobustDetector
from stabnorm.monitor.statistics import resolve
from stabnorm.switch.gate import AffineGate


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))


def _monitor() -> StabilityMonitor:
    model = _model()
    with StabilityMonitor(model, flush_every=4, companions=["weights"]) as monitor:
        for _ in range(6):
            model(torch.randn(5, 4)).square().mean().backward()
            monitor.step()
    return monitor


def _detector() -> RobustDetector:
    detector = RobustDetector(resolve("standard"), ["a", "b"])
    detector.update(0, torch.rand(9, 2, len(resolve("standard"))), torch.full((9, 2), 64.0), torch.zeros(9, 2).bool())
    return detector


def _switch(schedule: str) -> ProgressiveSwitch:
    model = _model()
    convert_norms(model)
    switch = ProgressiveSwitch(model, total_steps=20, schedule=schedule)
    for _ in range(3):
        model(torch.randn(5, 4)).square().mean().backward()
        switch.step()
    return switch


STATEFUL: dict[str, Callable[[], Any]] = {
    "monitor": _monitor,
    "detector": _detector,
    "gate": lambda: AffineGate(["a", "b"], 20),
    "linear switch": lambda: _switch("linear"),
    "adaptive switch": lambda: _switch("adaptive"),
}
DAMAGE: tuple[Any, ...] = ("garbage", None, 5, [], {"other": 1}, [[1]], object())


OURS = "nothing of it was loaded. Give what its state_dict() returned", "the saved", "the checkpoint", "the state lacks"


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or one != one)


@pytest.mark.parametrize("name", STATEFUL)
def test_each_damaged_value_is_refused_in_our_words_and_leaves_the_state_as_it_was(name: str) -> None:
    owner = STATEFUL[name]()
    good = copy.deepcopy(owner.state_dict())
    refused = 0
    for part in good:
        for value in DAMAGE:
            if type(value) is type(good[part]) and value == good[part]:
                continue
            complaint = ""
            try:
                owner.load_state_dict(copy.deepcopy(good) | {part: value})
            except (ValueError, StabNormError) as error:
                complaint = str(error)
            if complaint:
                refused += 1
                assert any(words in complaint for words in OURS)
                assert same(owner.state_dict(), good), (part, value)
            owner.load_state_dict(copy.deepcopy(good))
    assert refused > len(good)
