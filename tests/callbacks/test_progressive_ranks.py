"""Two processes under DDP, through every phase: same lam, same weights, no parameter without a gradient."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from stabnorm.callbacks import ProgressiveNormCallback, StabilityCallback
from stabnorm.switch.lam import progressive_norms
from tests.lightning_small import BATCHES, fit, module, trainer
from tests.processes import one_after_the_other, run_ranks

pytestmark = [pytest.mark.slow, one_after_the_other]

LinearSwitch = functools.partial(ProgressiveNormCallback, schedule="linear")  # whose lam is known beforehand


STEPS = 2 * BATCHES


def variables_of(rank: int) -> dict[str, str]:
    """With these in place Lightning takes the processes, and the group that they are, as it finds them."""
    return {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the callback, and of the Trainer
    "together": ({"start": 4, "fraction": 0.5}, {}),
    "deep first": ({"start": 4, "fraction": 0.6, "order": "deep_first"}, {}),
    "adaptive": ({"schedule": "adaptive"}, {}),
    "synchronised": ({}, {"sync_batchnorm": True}),
}


def one_rank(rank: int, folder: Path) -> None:
    os.environ |= variables_of(rank)
    for case, (options, run_options) in CASES.items():
        model = module(heavy=True)
        callbacks = [
            LinearSwitch(**options),
            *([StabilityCallback()] if options.get("start") else []),
        ]
        defaults = dict(strategy="ddp", devices=2, max_epochs=4, use_distributed_sampler=True)
        fit(trainer(folder, *callbacks, **{**defaults, **run_options}), model)
        flags = [(norm.leave_out_norm, norm.sync) for norm in progressive_norms(model).values()]
        gate = callbacks[0].switch.gate  # type: ignore[attr-defined]
        residuals = None if gate is None else gate.residuals
        torch.save((model.lams, model.state_dict(), flags, residuals), folder / f"{case}.{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What came of each case; two processes for all of them, for it takes them long to start."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(one_rank, folder)
    return folder


def both(folder: Path, case: str) -> tuple[Any, Any]:
    first, second = (torch.load(folder / f"{case}.{rank}.pt") for rank in (0, 1))
    assert first[0] == second[0]
    assert len(first[0]) == STEPS
    for name, value in first[1].items():
        if "running" not in name and "window" not in name:  # each rank's own, unless they are synchronised
            assert torch.equal(value, second[1][name]), name
    return first, second


@pytest.mark.parametrize("case", ["together", "deep first"])
def test_all_phases_of_a_schedule(folder: Path, case: str) -> None:
    (lams, state, flags, _), _ = both(folder, case)
    assert lams[4] == [1.0, 1.0]  # the norm alone
    assert any(0 < lam < 1 for lam in lams[12])  # both
    assert lams[-1] == [0.0, 0.0]  # RepBN alone, the norm left out
    assert flags == [(True, False)] * 2
    assert state["net.1.lam"] == 0


def test_the_gate_decides_alike_from_what_both_measure(folder: Path) -> None:
    first, second = both(folder, "adaptive")
    assert first[3] == second[3]
    assert first[0][-1] == [0.0, 1.0]
    assert first[2] == [(True, False), (False, False)]  # what is switched leaves its norm out


def test_sync_batchnorm_is_respected(folder: Path) -> None:
    first, second = both(folder, "synchronised")
    assert first[2] == [(True, True)] * 2
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name]), name
