"""Which tokens count: the masks that are active, and the one that fits a layer."""

from types import TracebackType

import torch
from torch import Tensor

_masks: list[Tensor] = []  # a plain list: Dynamo follows it, and not a context variable


class valid_tokens:  # used like a function: `with valid_tokens(mask):`
    """Within this context padding does not count, for every monitored or stabnorm layer whose tokens the mask fits.

    A mask fits a layer when it has the shape of the layer's input without the channel axis, that shape's leading axes
    (it is then repeated along the rest, heads say), or as many elements as a flattened input has rows. A layer whose
    tokens have another number of axes is not concerned.

    Args:
        *masks: bool tensors, True = valid token; for an encoder-decoder one for each, the first that fits is taken.

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: in a layer's forward, when its tokens have a mask's axes and batch but not its length.

    >>> import torch, stabnorm
    >>> with stabnorm.valid_tokens(torch.tensor([[True, True, False]])):
    ...     pass  # model(batch)
    """

    def __init__(self, *masks: Tensor) -> None:
        for mask in masks:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"a mask of valid tokens is a bool tensor, True = valid; got {found}. Use mask.bool()")
        self._pushed = masks

    def __enter__(self) -> "valid_tokens":
        _masks.extend(self._pushed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del _masks[len(_masks) - len(self._pushed) :]


def mask_for(tokens: torch.Size, name: str) -> Tensor | None:
    """The active mask that fits a layer's tokens, in their shape; None when none concerns it."""
    near: Tensor | None = None
    for mask in reversed(_masks):
        if mask.shape == tokens:
            return mask
        if len(tokens) > mask.ndim and mask.shape == tokens[: mask.ndim]:
            return mask.reshape(*mask.shape, *[1] * (len(tokens) - mask.ndim)).expand(tokens)
        if len(tokens) == 1 and mask.numel() == tokens[0]:
            return mask.reshape(-1)
        if mask.ndim == len(tokens) > 1 and mask.shape[0] == tokens[0]:
            near = mask
    if near is not None:
        raise ValueError(
            f"the mask has shape {tuple(near.shape)}, but the input of norm {name!r} has tokens of shape "
            f"{tuple(tokens)}: a mask has the input's shape without the channel axis. Give a mask of that shape (a "
            "class token needs an entry, too), or exclude the layer."
        )
    return None
