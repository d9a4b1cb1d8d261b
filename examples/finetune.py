"""Remove LayerNorm from a trained model by fine-tuning: `python -m stabnorm.examples.finetune`.

First a small vision transformer with LayerNorm is trained on digit images and saved. Then the checkpoint is loaded, and
the training goes on with `ProgressiveNormCallback`, which converts the norms and moves lam from 1 to 0. This takes a
minute on two cores.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning import Callback, Trainer, seed_everything

from stabnorm import find_norms
from stabnorm.callbacks import ProgressiveNormCallback
from stabnorm.examples.digits import DigitsViT, digits_loaders


def fit(
    model: DigitsViT, steps: int, callbacks: list[Callback], root: Path, *, progress: bool
) -> tuple[Trainer, float]:
    """Train, and return the accuracy of the result; the record with lam is written to the root."""
    train, test = digits_loaders()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, limit_val_batches=0, logger=False, callbacks=callbacks,
        default_root_dir=root, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=progress,
    )  # fmt: skip
    trainer.fit(model, train)
    judge = Trainer(accelerator="cpu", logger=False, enable_model_summary=False, enable_progress_bar=False)
    (result,) = judge.validate(model, test, verbose=False)
    return trainer, result["val/accuracy"]


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train, save, load, convert and fine-tune; return both accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/finetune"), help="where checkpoint and record go")
    parser.add_argument("--steps", type=int, default=400, help="of the training; the fine-tuning takes as many")
    parser.add_argument("--no-progress", action="store_true", help="hide the progress bars")
    options = parser.parse_args(arguments)
    seed_everything(0, verbose=False)
    trainer, before = fit(DigitsViT(), options.steps, [], options.root, progress=not options.no_progress)
    path = options.root / "layernorm.ckpt"
    trainer.save_checkpoint(path)
    print(f"trained with LayerNorm: {100 * before:.1f} %, saved as {path}")
    # A third of the learning rate: these weights have been trained already.
    model = DigitsViT.load_from_checkpoint(path, lr=1e-3)
    switch = ProgressiveNormCallback()
    _, after = fit(model, options.steps, [switch], options.root, progress=not options.no_progress)
    norms = find_norms(model)
    assert switch.switch is not None
    kept = switch.switch.kept
    print(f"fine-tuned with the switch: {100 * after:.1f} %; {len(norms) - len(kept)} of {len(norms)} norms gone")
    return before, after


if __name__ == "__main__":
    main()
