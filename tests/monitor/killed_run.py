"""A small training that is killed at random, resumed, and killed again: `python -m tests.monitor.killed_run DIR KILLS`.

The run flushes every third step and saves a checkpoint every fifth, so that kills come with rows that are flushed and
not in a checkpoint, in a checkpoint and not flushed, both, and neither. After each kill everything that could be read
before must still be there, with the same values.
"""

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from stabnorm import StabilityMonitor
from stabnorm.monitor.record import FileRecord, Record, TensorBoardRecord, read_record

FLUSH_EVERY, SAVE_EVERY = 3, 5
RECORDS = ("files", "tensorboard")


def train(folder: Path, steps: int, tell: int | None = None) -> None:
    """Go on from the last checkpoint to so many steps; a byte into `tell` after each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = StabilityMonitor(model, flush_every=FLUSH_EVERY)
    checkpoint, start = folder / "last.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        start = state["step"]
        for part, name in ((model, "model"), (optimizer, "optimizer"), (monitor, "monitor")):
            part.load_state_dict(state[name])
    writer = SummaryWriter(str(folder / "tensorboard"))
    monitor.records += [FileRecord(folder / "files"), TensorBoardRecord(writer)]
    with monitor:
        for step in range(start, steps):
            generator = torch.Generator().manual_seed(step)
            x, target = torch.randn(9, 4, generator=generator), torch.randn(9, 2, generator=generator)
            if step % 7 == 6:
                x[0, 0] *= 1e3
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
            if (step + 1) % SAVE_EVERY == 0:
                parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save({**parts, "monitor": monitor.state_dict()}, half := folder / "half.pt")
                os.replace(half, checkpoint)
            if tell is not None:
                os.write(tell, b".")
    writer.close()


def killed_after(folder: Path, steps: int, delay: float) -> None:
    """One process that trains, and is killed a moment after so many steps."""
    heard, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            train(folder, 10**6, tell)
        finally:
            os._exit(1)
    os.close(tell)
    for _ in range(steps):
        assert os.read(heard, 1) == b".", "the run ended by itself"
    signal.sigtimedwait([], delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(heard)


def read(folder: Path, record: str) -> Record | None:
    try:
        return read_record(folder / record)
    except FileNotFoundError:
        return None


def main(folder: Path, kills: int, seed: int = 0) -> int:
    """The number of steps that were flushed by the last kill."""
    torch.set_num_threads(1)
    train(folder / "first", 1)  # what an optimizer loads at its first step takes seconds: once, not in each process
    dice = random.Random(seed)
    before: dict[str, Record | None] = dict.fromkeys(RECORDS)
    for _ in range(kills):
        killed_after(folder, dice.randint(1, 11), dice.random() * 4e-3)
        for name in RECORDS:
            now, then = read(folder, name), before[name]
            if then is not None:
                assert now is not None
                assert_holds(now, then)
            before[name] = now
    ends = [record.steps[-1] + 1 for record in before.values() if record is not None]
    assert ends, "nothing was ever flushed: the kills came too early"
    steps = int(max(ends)) + 4
    train(folder, steps)
    train(folder / "whole", steps)
    for name in RECORDS:
        killed, whole = read_record(folder / name), read_record(folder / "whole" / name)
        assert killed.steps.tolist() == list(range(steps))
        assert_holds(killed, whole)
        assert_holds(whole, killed)
        assert [(e.kind, e.step) for e in killed.events] == [(e.kind, e.step) for e in whole.events]
    return steps


def assert_holds(now: Record, then: Record) -> None:
    """Every number of `then` is in `now`, the same to rounding; a block that a kill cut short may be whole by now."""
    assert set(then.steps) <= set(now.steps)
    rows = np.searchsorted(now.steps, then.steps)
    for name, values in then.series.items():
        known = ~np.isnan(values)
        np.testing.assert_allclose(now.series[name][rows][known], values[known], rtol=1e-5, atol=1e-6, err_msg=name)


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), int(sys.argv[2])), "steps")
