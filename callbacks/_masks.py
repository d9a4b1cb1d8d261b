"""The masks of a batch, from a callback's argument `mask=`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stabnorm._checks import shown
from stabnorm._log import logger
from stabnorm._models.masks import MaskOfBatch, check_mask, masks_of, valid_tokens

__all__ = ["BatchMask", "MaskOfBatch"]


class BatchMask:
    """Keeps `valid_tokens` open during the training on a batch.

    Args:
        mask: a key, an attribute or an index of the batch, or a function of it; None means that every token is valid.
    """

    def __init__(self, mask: MaskOfBatch) -> None:
        check_mask(mask)
        self.mask = mask
        self._open: valid_tokens | None = None
        self._asked = False

    def enter(self, batch: Any) -> None:
        """Open the masks of a batch; first close those of an earlier batch that did not end."""
        self.leave()
        if self.mask is not None:
            masks = masks_of(batch, self.mask)
            self._open = valid_tokens(*masks)
            self._open.__enter__()
            if not self._asked:
                self._asked = True
                self._ask(masks)

    def _ask(self, masks: Sequence[Tensor]) -> None:
        """Ask whether the mask is inverted if it leaves out most of the first batch; later ones are not read."""
        valid, every = (sum(numbers) for numbers in zip(*((int(m.sum()), m.numel()) for m in masks), strict=True))
        if valid < every / 2:
            logger.warning(
                "mask=%s leaves out %.0f %% of the first batch's tokens. Is it inverted? True means a valid token: if "
                "yours is True for padding, give a function that inverts it, such as lambda batch: ~batch['padding']",
                shown(self.mask), 100 * (1 - valid / every),
            )  # fmt: skip

    @property
    def masks(self) -> Sequence[Tensor]:
        """The masks that are open."""
        return () if self._open is None else self._open.masks

    def leave(self) -> None:
        """Close the masks of the batch, if any are open."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def __getstate__(self) -> dict[str, Any]:
        return {"mask": self.mask, "_open": None, "_asked": self._asked}
