"""Watch a training with Hugging Face's Trainer: `python -m stabnorm.examples.hugging_face`.

It needs `pip install "stabnorm[hugging_face]"`.

`StabilityTrainerCallback` is one of the Trainer's callbacks. The model is a GPT-2 of two layers with random weights,
and the text is that of Python's own documentation, so that no network is needed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stabnorm import StabilityMonitor
from stabnorm.callbacks.hugging_face import StabilityTrainerCallback
from stabnorm.examples.characters import ALPHABET, CONTEXT, text_loaders


def windows() -> list[dict[str, torch.Tensor]]:
    """Windows of text in the format of a Hugging Face language model."""
    dataset: Any = text_loaders()[0].dataset
    return [{"input_ids": window, "labels": window} for (window,) in dataset]


def main(arguments: Sequence[str] | None = None) -> StabilityMonitor:
    """Train, and print what the monitor found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/hugging_face"), help="where everything goes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args(arguments)
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
    except ImportError as error:
        raise SystemExit("this example needs `pip install 'stabnorm[hugging_face]'`") from error
    set_seed(0)
    config = GPT2Config(vocab_size=len(ALPHABET), n_positions=CONTEXT + 1, n_embd=48, n_layer=2, n_head=4)
    callback = StabilityTrainerCallback(flush_every=10)
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            output_dir=str(options.root), max_steps=options.steps, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, learning_rate=1e-3, save_steps=25, logging_steps=25, report_to=[],
            use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=windows(),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=options.resume)
    assert callback.monitor is not None
    print(
        f"{callback.monitor.steps_done} steps, {len(callback.monitor.alerts)} alerts; record: {options.root}/stabnorm"
    )
    return callback.monitor


if __name__ == "__main__":
    main()
