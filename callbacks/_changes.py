"""Changes of a training that a callback can see: they are announced to the monitor, so that they raise no alert."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


class Feed(NamedTuple):
    """What feeds a training; None where a part cannot be told."""

    batches: int
    batch_size: int | None
    data: int | None  # the identity of the data set

    @classmethod
    def of(cls, trainer: "Trainer") -> "Feed":
        """Look at the Trainer, at the start of an epoch."""
        loader: Any = trainer.train_dataloader
        size, data = getattr(loader, "batch_size", None), getattr(loader, "dataset", None)
        identity = None if data is None else id(data)  # a data set may be a tensor, which is not asked for its truth
        return cls(trainer.accumulate_grad_batches, size if isinstance(size, int) else None, identity)

    def change(self, before: "Feed") -> str:
        """Say what is different from before; "" if nothing is.

        >>> Feed(2, 32, None).change(Feed(1, 32, None))
        'gradients accumulate over 2 batches instead of 1'
        """
        parts = []
        if self.batches != before.batches:
            parts.append(f"gradients accumulate over {self.batches} batches instead of {before.batches}")
        if self.batch_size != before.batch_size and None not in (self.batch_size, before.batch_size):
            parts.append(f"the batch size is {self.batch_size} instead of {before.batch_size}")
        if self.data != before.data and None not in (self.data, before.data):
            parts.append("another data set")
        return ", ".join(parts)
