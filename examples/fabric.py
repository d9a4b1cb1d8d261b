"""Lightning Fabric, watched: `python -m examples.fabric`, or with `--devices 2` in two processes.

Fabric wraps model, optimizer and data; the loop stays yours. The monitor takes the model itself and is stepped after
the optimizer. On every rank: what they see is merged, and only the first writes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.nn import functional as F

from examples.digits import DigitsViT, augment, digits_loaders
from stabnorm import StabilityMonitor
from stabnorm.monitor.record import FileRecord


def main(arguments: Sequence[str] | None = None) -> StabilityMonitor:
    """Train, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/fabric"), help="where the record goes")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--devices", type=int, default=1, help="processes, on the CPU")
    options = parser.parse_args(arguments)
    fabric = Fabric(accelerator="cpu", devices=options.devices, strategy="ddp" if options.devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    net: Any = DigitsViT()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    model, optimizer = fabric.setup(net, optimizer)
    loader = fabric.setup_dataloaders(digits_loaders(batch_size=64 // options.devices)[0])
    monitor = StabilityMonitor(net, flush_every=10)
    if fabric.is_global_zero:
        monitor.records.append(FileRecord(options.root))
    with monitor:
        for _ in range(options.epochs):
            for images, digits in loader:
                loss = F.cross_entropy(model(augment(images)), digits)
                optimizer.zero_grad()
                fabric.backward(loss)
                optimizer.step()
                monitor.step(loss=loss)
    for record in monitor.records:
        record.close()
    fabric.print(f"{monitor.steps_done} steps, {len(monitor.alerts)} alerts; the record is in {options.root}")
    return monitor


if __name__ == "__main__":
    main()
