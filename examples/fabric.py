"""Watch a training with Lightning Fabric: `python -m stabnorm.examples.fabric`, or `--devices 2` for two processes.

Fabric wraps model, optimizer and data; the loop is your own. Every process has a monitor, and calls its `step` after
the optimizer step. The measurements of all processes are merged, and the first process writes them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.nn import functional as F

from stabnorm.callbacks.fabric import FabricMonitor
from stabnorm.examples.digits import DigitsViT, augment, digits_loaders


def main(arguments: Sequence[str] | None = None) -> FabricMonitor:
    """Train, and print what the monitor found."""
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
    with FabricMonitor(fabric, model, directory=options.root, flush_every=10) as monitor:
        for _ in range(options.epochs):
            for images, digits in loader:
                loss = F.cross_entropy(model(augment(images)), digits)
                optimizer.zero_grad()
                fabric.backward(loss)
                optimizer.step()
                monitor.step(loss=loss, optimizer=optimizer)
    fabric.print(f"{monitor.steps_done} steps, {len(monitor.alerts)} alerts; the record is in {options.root}")
    return monitor


if __name__ == "__main__":
    main()
