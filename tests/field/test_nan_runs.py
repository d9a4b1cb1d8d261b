"""A run whose numbers are NaN is told that they are, and not that nobody trains it."""

import logging
import math

import pytest
import torch
from torch import nn

from stabnorm import StabilityMonitor
from tests.companions.nets import Text, batch, loss

COMPANIONS = ["weights", "embedding", "attention", "output"]


def train(monitor: StabilityMonitor, model: nn.Module, steps: int, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model, batch())
        value.backward()
        optimizer.step()
        monitor.step(loss=value)


@pytest.mark.parametrize("calm_steps", [0, 4, 6])
def test_weights_that_turned_nan_are_not_called_unseen(calm_steps: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = Text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with StabilityMonitor(model, "economy", companions=["weights", "embedding"], flush_every=4) as monitor:
        train(monitor, model, calm_steps, optimizer)
        with torch.no_grad():
            model.tokens.weight.fill_(math.nan)
        train(monitor, model, 10, optimizer)
    assert all(p.isnan().all() for p in model.parameters() if p.ndim > 1)
    assert "no optimizer step was seen" not in caplog.text
    assert any(alert.kind == "nonfinite" for alert in monitor.alerts)


def test_what_was_seen_before_is_not_called_unseen_once_it_is_nan(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = Text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with StabilityMonitor(model, "economy", companions=COMPANIONS, flush_every=4) as monitor:
        train(monitor, model, 4, optimizer)
        with torch.no_grad():
            model.tokens.weight.fill_(math.nan)
        train(monitor, model, 10, optimizer)
    for words in ("no optimizer step", "no attention was seen", "did not run"):
        assert words not in caplog.text


def test_what_is_nan_from_the_first_step_on_may_be_nan_in_the_words_of_the_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Text()
    with torch.no_grad():
        model.tokens.weight.fill_(math.nan)
    with StabilityMonitor(model, "economy", companions=COMPANIONS) as monitor:
        train(monitor, model, 3, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "no optimizer step" not in caplog.text
    assert "If all its logits were NaN, look at the first alert" in caplog.text
    assert "or gave nothing but NaN" in caplog.text
