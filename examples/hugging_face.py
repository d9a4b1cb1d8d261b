"""Hugging Face's Trainer, watched: `python -m examples.hugging_face`, with `pip install transformers accelerate`.

`StabilityTrainerCallback` is all there is to it: copy it. `main` trains a GPT-2 of two layers, with random weights, on
the text of Python's own documentation, and needs no network.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from examples.characters import ALPHABET, CONTEXT, text_loaders
from stabnorm import StabilityMonitor
from stabnorm.monitor.record import FileRecord

if TYPE_CHECKING:
    TrainerCallback = object
else:
    try:
        from transformers import TrainerCallback
    except ImportError:  # the class is still good for reading
        TrainerCallback = object


class StabilityTrainerCallback(TrainerCallback):
    """Watches the norms of the Trainer's model; its record is in `stabnorm/` of the output directory.

    Gradients are those of the loss as it is in float32 and bf16; with fp16 they have its scale.

    Args:
        **options: of `StabilityMonitor`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.monitor: StabilityMonitor | None = None
        self.learning_rate: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Hooks on; resumed, the monitor goes on from what lies beside the checkpoint."""
        self.monitor = StabilityMonitor(model, **self.options)
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "stabnorm.pt"
        if saved.exists():
            self.monitor.load_state_dict(torch.load(saved, weights_only=True))
        self.monitor.steps_done = state.global_step
        if state.is_world_process_zero:
            self.monitor.records.append(FileRecord(Path(args.output_dir) / "stabnorm"))
        self.monitor.attach()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins; its micro-batches are one."""
        assert self.monitor is not None
        self.monitor.discard()
        self.learning_rate = kwargs["lr_scheduler"].get_last_lr()[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        assert self.monitor is not None
        self.monitor.step(learning_rate=self.learning_rate)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The monitor's state, beside the model's."""
        assert self.monitor is not None
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.monitor.state_dict(), folder / "stabnorm.pt")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hooks off, and all that was seen into the record."""
        assert self.monitor is not None
        self.monitor.detach()
        self.monitor.flush()
        for record in self.monitor.records:
            record.close()


def windows() -> list[dict[str, torch.Tensor]]:
    """Windows of text as a language model of Hugging Face's takes them."""
    dataset: Any = text_loaders()[0].dataset
    return [{"input_ids": window, "labels": window} for (window,) in dataset]


def main(arguments: Sequence[str] | None = None) -> StabilityMonitor:
    """Train, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/hugging_face"), help="where everything goes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args(arguments)
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
    except ImportError as error:
        raise SystemExit("this example needs `pip install transformers accelerate`") from error
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
