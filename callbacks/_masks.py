"""The masks of a batch, from a callback's argument `mask=`."""

from typing import Any

from stabnorm._models.masks import MaskOfBatch, check_mask, masks_of, valid_tokens

__all__ = ["BatchMask", "MaskOfBatch"]


class BatchMask:
    """Keeps `valid_tokens` open during the training on a batch.

    Args:
        mask: a key of the batch, an index, or a function of the batch; None means that every token is valid.
    """

    def __init__(self, mask: MaskOfBatch) -> None:
        check_mask(mask)
        self.mask = mask
        self._open: valid_tokens | None = None

    def enter(self, batch: Any) -> None:
        """Open the masks of a batch; first close those of an earlier batch that did not end."""
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
