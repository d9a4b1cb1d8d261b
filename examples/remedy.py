"""A run breaks, its alert names a remedy, and with one more line it trains: `python -m stabnorm.examples.remedy`.

A small character transformer starts with a learning rate that is far too large for it, and without a warm-up. Its
attention logits grow until the softmax only ever picks one key, and the loss stops falling. The monitor raises an alert
and says what to apply. The second run, of the same seed, applies it before the first step; nothing else changes.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import AdamW

from stabnorm import Alert, StabilityMonitor
from stabnorm.examples.characters import ALPHABET, CharacterTransformer, text_loaders
from stabnorm.remedies import sigma_reparametrize


class Outcome(NamedTuple):
    """The mean loss of the last tenth of the steps, the largest logit of the last step, and what the monitor said."""

    loss: float
    logit: float
    alerts: list[Alert]


def train(steps: int, learning_rate: float, remedy: Callable[[nn.Module], object] | None = None) -> Outcome:
    """Train from seed 0, with a remedy or without."""
    torch.manual_seed(0)
    batches = chain.from_iterable(repeat(text_loaders()[0]))
    model = CharacterTransformer(depth=2)
    if remedy is not None:
        remedy(model)
    optimizer = AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses = []
    with StabilityMonitor(model, companions=["attention"]) as monitor:
        for _ in range(steps):
            (windows,) = next(batches)
            loss = model.loss(windows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
            losses.append(loss.item())
        logits = monitor.companions["attention"].history()["attention_logit_max"]
    last = losses[-max(1, steps // 10) :]
    return Outcome(sum(last) / len(last), float(logits[-1].max()), monitor.alerts)


def said(alerts: Sequence[Alert]) -> str:
    """Return which statistics raised alerts, and at which steps."""
    steps: dict[str, list[str]] = {}
    for alert in alerts:
        steps.setdefault(alert.statistic, []).append(str(alert.step))
    parts = (f"{name} at step {', '.join(dict.fromkeys(at))}" for name, at in steps.items())
    return "; ".join(parts) or "none"


def main(arguments: Sequence[str] | None = None) -> tuple[Outcome, Outcome]:
    """Train both, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    options = parser.parse_args(arguments)
    print(f"1. A character transformer, {options.steps} steps, learning rate {options.learning_rate:g}, no warm-up")
    broken = train(options.steps, options.learning_rate)
    summarise(broken)
    advice = [alert for alert in broken.alerts if "stabnorm.remedies." in alert.reason]
    if not advice:
        print("No alert named a remedy. Give it more steps, or a larger learning rate")
    for alert in advice[:1]:
        print(f"   what to do: at step {alert.step} the monitor says of {alert.layer}:")
        print(f"      {alert.reason}")
    print("2. The same seed, with the line sigma_reparametrize(model) before the optimizer is built")
    cured = train(options.steps, options.learning_rate, sigma_reparametrize)
    summarise(cured)
    print("`stabnorm remedies attention_logit_max` lists what else helps against growing attention logits.")
    return broken, cured


def summarise(outcome: Outcome) -> None:
    """Print how a training ended."""
    guessing = math.log(len(ALPHABET))
    print(f"   loss at the end: {outcome.loss:.2f} nats per character (guessing: {guessing:.2f})", end="")
    print(f"; largest attention logit: {outcome.logit:,.0f} (above 100 the softmax saturates)")
    print(f"   alerts: {said(outcome.alerts)}")


if __name__ == "__main__":
    main()
