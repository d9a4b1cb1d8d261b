"""See, switch and ship, on a small vision transformer: `python -m stabnorm.examples.demo`, or `make demo`.

The demo trains three times on scikit-learn's digit images, with 600 steps each; together this takes a minute and a
half. The first run is healthy. The second one equals the first until step 300; from then on, a weight decay with the
wrong sign makes the weight matrices of one block grow by two percent in each step. The LayerNorms hide this growth, so
for more than a hundred steps the loss looks normal, but the inputs of the norms show it within twenty steps, and the
alarm says between which norms the cause lies. The third run is the first one with `ProgressiveNormCallback()`: it ends
without LayerNorm, and `FoldCallback()` writes a model without any norm.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.loggers import TensorBoardLogger

from stabnorm import Alert, Onset, find_norms
from stabnorm.callbacks import FoldCallback, ProgressiveNormCallback, StabilityCallback
from stabnorm.dashboard.relative_map import relative_map
from stabnorm.dashboard.runs import open_run
from stabnorm.dashboard.verdict import loss_doubled
from stabnorm.examples.digits import Destabilize, DigitsViT, digits_loaders
from stabnorm.monitor.record import Record, read_record

STEPS = 600
FAULT_AT = 300
BROKEN, GROWTH = "blocks.1", 1.02  # what breaks in the unstable run, and how fast


@dataclass(frozen=True)
class Run:
    """The result of a run."""

    accuracy: float
    alerts: list[Alert]
    onsets: list[Onset]
    record: Record
    cost: str
    model: DigitsViT
    dumps: list[Path]

    @property
    def loss_doubled_at(self) -> int | None:
        """Return the step at which the loss is twice what was usual before the alert, as on the dashboard."""
        return loss_doubled(self.record.series["loss"], self.alerts[0].step if self.alerts else FAULT_AT)


def watch(name: str, root: str, *others: Callback, progress: bool = True, seed: int = 0) -> Run:
    """Train once with `StabilityCallback`, and return the result.

    Args:
        name: name of the run, which is a folder in ``root``.
        root: the folder of all runs, for TensorBoard.
        *others: further callbacks.
        progress: False hides the progress bar.
        seed: seed of weights, batches and augmentation.
    """
    seed_everything(seed, verbose=False)
    stability = StabilityCallback(flush_every=10)
    logger = TensorBoardLogger(root, name=name)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=logger,
        log_every_n_steps=10,
        callbacks=[stability, *others],
        check_val_every_n_epoch=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    model, (train, test) = DigitsViT(dim=96), digits_loaders()
    trainer.fit(model, train, test)
    trainer.validate(model, test, verbose=False)
    assert stability.monitor is not None
    accuracy = float(trainer.callback_metrics["val/accuracy"])
    assert stability.recorder is not None
    monitor, dumps = stability.monitor, stability.recorder.dumps
    record, cost = read_record(logger.log_dir), str(monitor.cost)
    return Run(accuracy, monitor.alerts, monitor.onsets, record, cost, model, dumps)


def draw(name: str, root: str, path: str) -> None:
    """Draw every norm of a run against its usual value, with its alerts."""
    (folder,) = Path(root, name).iterdir()
    run = open_run(name, folder)
    run.refresh()
    image = relative_map(run)
    assert image is not None
    Image.fromarray(image).save(path, optimize=True)


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    """Return the share of test images that are recognised, without a Trainer."""
    ((images, digits),) = digits_loaders()[1]
    right: torch.Tensor = model.eval()(images).argmax(1) == digits
    return float(right.float().mean())


def main(arguments: Sequence[str] | None = None) -> tuple[Run, Run, Run]:
    """Run all three, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="runs", help="where the runs are written (default: runs)")
    parser.add_argument("--picture", help="also draw the unstable run's norms against their past there, for the README")
    parser.add_argument("--no-progress", action="store_true", help="hide the bars (default: shown in a terminal)")
    options = parser.parse_args(arguments)
    for name in ("pytorch_lightning", "lightning.pytorch"):  # the hints of either would bury what there is to see
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    progress = sys.stderr.isatty() and not options.no_progress
    print("--- healthy: a small vision transformer on digit images ---")
    healthy = watch("healthy", options.root, progress=progress)
    print(f"--- unstable: the same, with a weight decay in {BROKEN} whose sign is turned from step {FAULT_AT} on ---")
    unstable = watch("unstable", options.root, Destabilize(BROKEN, FAULT_AT, GROWTH), progress=progress)
    print("--- switched: the healthy one, whose norms leave LayerNorm while it trains ---")
    callback, fold = ProgressiveNormCallback(), FoldCallback()
    switched = watch("switched", options.root, callback, fold, progress=progress)
    assert callback.switch is not None
    assert fold.result is not None
    print("--- what there was to see ---")
    for name, run in (("healthy", healthy), ("unstable", unstable), ("switched", switched)):
        first = f"first alert at step {run.alerts[0].step}" if run.alerts else "no alert"
        doubled = f"loss doubled at step {run.loss_doubled_at}" if run.loss_doubled_at else "loss never doubled"
        print(f"{name:9s} accuracy {100 * run.accuracy:5.1f} %   {first}, {doubled}   monitoring {run.cost}")
    for onset in unstable.onsets[:1]:
        print(f"what broke: {onset}")
    norms, kept = len(callback.switch.norms), len(callback.switch.kept)
    print(
        f"accuracy with LayerNorm {100 * healthy.accuracy:.1f} %, switched {100 * switched.accuracy:.1f} %; "
        f"{norms - kept} of {norms} norms are affine now"
    )
    print(
        f"folded: {len(find_norms(fold.result.model))} norms left, accuracy {100 * accuracy(fold.result.model):.1f} % "
        f"(switched {100 * switched.accuracy:.1f} %), largest relative error {fold.result.max_rel_error:.1e} in "
        f"{fold.result.precision}; it is in {os.path.relpath(fold.directory or options.root)}"
    )
    print("(A model this small pays the most for being watched; `make bench` measures a ViT-Tiny.)")
    if options.picture:
        draw("unstable", options.root, options.picture)
    tensorboard = Path(sys.executable).with_name("tensorboard")  # the one that make installed
    print(f"Look at them:  {os.path.relpath(tensorboard)} --logdir {options.root}   (the tab Stability)")
    command = os.path.relpath(tensorboard.with_name("stabnorm"))
    print(f"or, without TensorBoard:  {command} view {options.root}")
    if unstable.dumps:
        print(f"Run the unstable run's step after its first alert again:  {command} replay {unstable.dumps[0]}")
    return healthy, unstable, switched


if __name__ == "__main__":
    main()
