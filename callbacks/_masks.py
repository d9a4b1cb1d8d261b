"""Which tokens of a batch are valid, as a callback's `mask=` says it."""

from typing import Any

from stabnorm._models.masks import MaskOfBatch, masks_of, valid_tokens

__all__ = ["BatchMask", "MaskOfBatch"]


class BatchMask:
    """Holds `valid_tokens` open while a batch is trained on.

    Args:
        mask: a key of the batch, or an index, or a function of the batch; None: every token counts.
    """

    def __init__(self, mask: MaskOfBatch) -> None:
        self.mask = mask
        self._open: valid_tokens | None = None

    def enter(self, batch: Any) -> None:
        """A batch begins; the one before may have been left early, with no word that it is over."""
        self.leave()
        if self.mask is not None:
            self._open = valid_tokens(*masks_of(batch, self.mask))
            self._open.__enter__()

    def leave(self) -> None:
        """It is over; nothing happens where none began."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def __getstate__(self) -> dict[str, Any]:
        return {"mask": self.mask, "_open": None}
