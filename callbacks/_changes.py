"""Changes of a training that a callback can see: they are announced to the monitor, so that they raise no alert."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


class Feed(NamedTuple):
    """What a user sets and may change, in a training or from one to its resumption; None where it cannot be told."""

    batches: int | None = None
    batch_size: int | None = None
    data: int | None = None  # the identity of the data set
    precision: str | None = None
    learning_rate: float | None = None  # as it was set, and not where a schedule has brought it

    @classmethod
    def of(cls, trainer: "Trainer") -> "Feed":
        """Look at a Lightning Trainer, at the start of an epoch."""
        feed = cls.of_loader(trainer.train_dataloader, batches=trainer.accumulate_grad_batches)
        return feed._replace(precision=str(trainer.precision))

    @classmethod
    def of_loader(cls, loader: Any, **known: Any) -> "Feed":
        """Look at a loader, and take what else is known."""
        size, data = getattr(loader, "batch_size", None), getattr(loader, "dataset", None)
        identity = None if data is None else id(data)  # a data set may be a tensor, which is not asked for its truth
        return cls(batch_size=size if isinstance(size, int) else None, data=identity, **known)

    def saved(self) -> dict[str, Any]:
        """Return what a resumed run can compare, as plain containers; there, a data set is another object anyway."""
        return self._replace(data=None)._asdict()

    @classmethod
    def of_saved(cls, state: Any) -> "Feed | None":
        """Return what was saved; None if nothing was."""
        return cls(**{name: state[name] for name in cls._fields if name in state}) if state else None

    def change(self, before: "Feed") -> str:
        """Say what is different from before; "" if nothing is.

        >>> Feed(2, 32, None).change(Feed(1, 32, None))
        'gradients accumulate over 2 batches instead of 1'
        """
        parts = []
        if self.batches != before.batches and None not in (self.batches, before.batches):
            parts.append(f"gradients accumulate over {self.batches} batches instead of {before.batches}")
        if self.batch_size != before.batch_size and None not in (self.batch_size, before.batch_size):
            parts.append(f"the batch size is {self.batch_size} instead of {before.batch_size}")
        if self.data != before.data and None not in (self.data, before.data):
            parts.append("another data set")
        if self.precision != before.precision and None not in (self.precision, before.precision):
            parts.append(f"the precision is {self.precision} instead of {before.precision}")
        if self.learning_rate != before.learning_rate and None not in (self.learning_rate, before.learning_rate):
            parts.append(f"the learning rate is set to {self.learning_rate:g} instead of {before.learning_rate:g}")
        return ", ".join(parts)
