"""Two gloo processes, of which one saw the NaN or the spike: both skip the step, and nothing has changed on either."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from stabnorm import StabilityMonitor
from stabnorm.actions import Actions, Training
from tests.actions.nets import batches, everything, net, same, with_a_past
from tests.processes import run_ranks

pytestmark = pytest.mark.slow

STEPS = 9
SEEN_BY = {2: 1, 4: 0, 7: 1}  # the rank that sees the NaN of a step, or the spike of the last one
SPIKE = 7


def one_rank(rank: int, folder: Path) -> None:
    model = net()
    trained = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = batches(2 * STEPS, spoilt=[2 * step + rank for step, rank in SEEN_BY.items() if step != SPIKE])
    data[2 * SPIKE + SEEN_BY[SPIKE]] *= 1000
    data = data[rank::2]
    states: list[Any] = []
    seen: list[bool] = []
    with StabilityMonitor(trained, ["amax"], flush_every=2) as monitor:
        actions = Actions(
            Training(model, monitor, [optimizer]), {"non_finite": "skip", "spike": "skip", "one_layer": "clip"}
        )
        with_a_past(monitor, [optimizer])
        verdict_before_step = monitor.verdict_before_step

        def noted(*args: Any, **options: Any) -> Any:
            verdict = verdict_before_step(*args, **options)
            seen.append(verdict.here)
            return verdict

        monitor.verdict_before_step = noted  # type: ignore[method-assign]
        for batch in data:
            actions.begin_step()
            # Only the norm sees the NaN: gradients, which DDP would merge, stay finite.
            loss = trained(batch).nan_to_num().square().mean() * (0.0 if batch.isnan().any() else 1.0)
            loss.nan_to_num().backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.nan_to_num_()
            if not actions.skips(optimizer, loss=loss):
                optimizer.step()
            monitor.step(loss=loss)
            actions.end_step()
            optimizer.zero_grad()
            states.append(everything(model, optimizer))
    done = [(one.action, one.why.step, one.why.layer) for one in actions.done]
    torch.save((states, done, seen), f"{folder}/{rank}.pt")


def test_both_ranks_skip_what_one_saw(tmp_path: Path) -> None:
    run_ranks(one_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for rank, (states, done, seen) in enumerate(ranks):
        assert done == [("skip", step, "1") for step in SEEN_BY]
        assert seen == [SEEN_BY.get(step) == rank for step in range(STEPS)]
        for step in range(1, STEPS):
            assert same(states[step - 1], states[step]) == (step in SEEN_BY), step
        assert all(value.float().isfinite().all() for value in states[-1].values())
    for name in ("0.weight", "6.bias"):
        assert torch.equal(ranks[0][0][-1][name], ranks[1][0][-1][name])
