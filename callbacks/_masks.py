"""Which tokens of a batch are valid, as a callback's `mask=` says it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from stabnorm.masks import valid_tokens

MaskOfBatch = Callable[[Any], Tensor | Sequence[Tensor]] | int | str | None


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
            self._open = valid_tokens(*self._masks_of(batch))
            self._open.__enter__()

    def leave(self) -> None:
        """It is over; nothing happens where none began."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def _masks_of(self, batch: Any) -> Sequence[Tensor]:
        if callable(self.mask):
            masks = self.mask(batch)
        else:
            try:
                masks = batch[self.mask]
            except (KeyError, IndexError, TypeError) as error:
                has = f"keys {list(batch)}" if isinstance(batch, Mapping) else f"type {type(batch).__name__}"
                raise ValueError(
                    f"mask={self.mask!r} is no key of the batch, which has {has}; name the entry that says which "
                    "tokens are valid, or give a function of the batch"
                ) from error
        if masks is None:
            raise ValueError("the mask function returned None; it returns a bool tensor, True = valid token")
        if not isinstance(masks, Tensor):
            return masks
        # A key names what the tokenizer made, often 0 and 1; a function's answer is taken as it is.
        return (masks if callable(self.mask) else masks.bool(),)

    def __getstate__(self) -> dict[str, Any]:
        return {"mask": self.mask, "_open": None}
