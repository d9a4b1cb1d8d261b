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
        """Open the masks of a batch; those of a batch that was left early are closed first."""
        self.leave()
        if self.mask is not None:
            self._open = valid_tokens(*masks_of(batch, self.mask))
            self._open.__enter__()

    def leave(self) -> None:
        """Close the masks of the batch, if any are open."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def __getstate__(self) -> dict[str, Any]:
        return {"mask": self.mask, "_open": None}
