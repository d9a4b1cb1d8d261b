"""Watch a training loop of your own: `python -m stabnorm.examples.plain_loop`.

It trains the small vision transformer of `examples.digits` without a Trainer. When it is started again, it continues
from the last checkpoint. With several processes the record is that of the whole batch:
`torchrun --nproc-per-node 2 -m stabnorm.examples.plain_loop`.
"""

import argparse
import os
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from stabnorm import StabilityMonitor
from stabnorm.examples.digits import DigitsViT, augment, digits_loaders
from stabnorm.monitor.record import FileRecord


def train(folder: Path, steps: int) -> StabilityMonitor:
    """Train until this number of optimizer steps; start from the last checkpoint if there is one."""
    torch.manual_seed(0)
    several = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    net = DigitsViT()
    model: nn.Module = DistributedDataParallel(net) if several else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    monitor = StabilityMonitor(model, flush_every=10)  # on every rank
    if rank == 0:  # which alone writes
        monitor.records.append(FileRecord(folder / "record"))
    parts: dict[str, Any] = {"model": net, "optimizer": optimizer, "monitor": monitor}
    checkpoint = folder / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    batches = chain.from_iterable(repeat(digits_loaders()[0]))
    with monitor:
        while monitor.steps_done < steps:
            images, digits = (part.chunk(ranks)[rank] for part in next(batches))
            loss = F.cross_entropy(model(augment(images)), digits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
            if rank == 0 and monitor.steps_done % 25 == 0:
                torch.save({name: part.state_dict() for name, part in parts.items()}, half := folder / "half.pt")
                os.replace(half, checkpoint)  # a kill in between leaves the one before
    for record in monitor.records:
        record.close()
    return monitor


def main(arguments: Sequence[str] | None = None) -> StabilityMonitor:
    """Train, and print what the monitor found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/plain_loop"), help="where checkpoint and record go")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    if "WORLD_SIZE" in os.environ:  # torchrun's
        dist.init_process_group("gloo")
    monitor = train(options.root, options.steps)
    if not dist.is_initialized() or dist.get_rank() == 0:
        scale = monitor.history()["token_std_mean"][-1]
        print(f"{monitor.steps_done} steps, {len(monitor.alerts)} alerts; the record is in {options.root / 'record'}")
        print(
            "what each norm reads now:", {k: round(v, 2) for k, v in zip(monitor.layers, scale.tolist(), strict=True)}
        )
    if dist.is_initialized():
        dist.destroy_process_group()
    return monitor


if __name__ == "__main__":
    main()
