"""A name from a model, a checkpoint or a record reaches the terminal without what a terminal would obey."""

import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabnorm
from stabnorm._log import printable
from stabnorm.dashboard import format_table
from stabnorm.dashboard.table import Row

EVIL = "norm\x1b]0;owned\x07\x1b[2J\u202e"


class Norm(nn.Module):
    """It looks like a norm, and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def model(norm: nn.Module | None = None) -> nn.Module:
    """A model whose norm has an evil name."""
    made = nn.Sequential(nn.Linear(4, 4))
    made.add_module(EVIL, nn.LayerNorm(4) if norm is None else norm)
    made.add_module("last", nn.Linear(4, 4))
    return made.eval()


def warned(call: Callable[[], object]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return "\n".join(str(one.message) for one in caught)


def failed(call: Callable[[], object]) -> str:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        call()
    return str(error.value)


X = torch.randn(8, 4)
TEXTS: dict[str, Callable[[], str]] = {
    "the report of a conversion": lambda: str(stabnorm.convert_norms(model())),
    "the plan of a fold": lambda: str(stabnorm.plan_fold(model(), X)),
    "the report of a fold": lambda: str(stabnorm.fold_norms(model(stabnorm.nn.RepBN(4)), X)),
    "the report of a removal": lambda: str(stabnorm.remove_norms(model(), [X, X + 1])),
    "the table at the end": lambda: format_table([Row(EVIL, "amax jumped", "amax", 5120.0, 204)], steps=1000),
    "a warning about norms": lambda: warned(lambda: stabnorm.find_norms(model(Norm()))),
    "no norm to convert": lambda: failed(lambda: stabnorm.convert_norms(model(nn.BatchNorm1d(4)))),
    "a model on the meta device": lambda: failed(
        lambda: stabnorm.fold_norms(model(stabnorm.nn.RepBN(4)).to("meta"), X)
    ),
    "an option out of range": lambda: failed(lambda: stabnorm.convert_norms(model(), eps=-1)),
    "a pattern that matches nothing": lambda: failed(lambda: stabnorm.convert_norms(model(), include="nothing")),
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_printed_text_has_no_control_character_but_line_breaks(what: str) -> None:
    text = TEXTS[what]()
    assert "owned" in text or "LayerNorm" in text or "eps=-1" in text or "meta device" in text
    assert all(printable(line) == line for line in text.split("\n"))


def test_the_log_has_no_control_character_but_line_breaks(caplog: pytest.LogCaptureFixture) -> None:
    watched = model().train()
    with caplog.at_level(logging.WARNING, "stabnorm"), stabnorm.StabilityMonitor(watched, ["amax"]) as monitor:
        watched(X * float("nan"))
        monitor.step()
        monitor.flush()
    assert "owned" in caplog.text
    assert all(printable(line) == line for line in caplog.text.split("\n"))


def test_names_in_other_alphabets_stay_as_they_are() -> None:
    assert printable("кодировщик.层.norm 1") == "кодировщик.层.norm 1"
