"""Which tokens count: the masks that are active, and the one that fits a layer."""

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from stabnorm._checks import check_function, is_whole, nearest, shown, wrong_type

MaskOfBatch = Callable[[Any], Tensor | Sequence[Tensor]] | int | str | None

_everywhere: list["valid_tokens"] = []  # the open contexts of all threads


class _Open(threading.local):
    """The open contexts of a thread: trainings in several threads have masks of their own.

    An autograd thread, which nobody has started in Python, runs the recomputed forwards of activation checkpointing. It
    sees the contexts of all threads. These are plain lists, which Dynamo can follow, as it cannot follow a context
    variable.
    """

    def __init__(self) -> None:
        known = any(thread.ident == threading.get_ident() for thread in threading.enumerate())
        self.contexts: list[valid_tokens] = [] if known else _everywhere


_open = _Open()


class valid_tokens:  # used like a function: `with valid_tokens(mask):`
    """Within this context padding does not count, for every monitored or stabnorm layer whose tokens the mask fits.

    A mask fits a layer when it has the shape of the layer's input without the channel axis. Where the input splits the
    tokens further, [batch, length] also fits [batch, length, heads] and, if the lengths say so, [batch, heads, length];
    a flattened input is fitted by as many elements. A layer whose tokens have another number of axes ignores the mask.

    Args:
        *masks: bool tensors, True = valid token. For an encoder-decoder pass one for each; the first that fits is used.

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: a mask is a single value.
        ValueError: in a layer's forward, when its tokens have a mask's axes and batch but not its length, or are
            transposed.

    >>> import torch, stabnorm
    >>> with stabnorm.valid_tokens(torch.tensor([[True, True, False]])):
    ...     pass  # model(batch)
    """

    def __init__(self, *masks: Tensor) -> None:
        for mask in masks:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"a mask of valid tokens is a bool tensor, True = valid; got {given}. Use mask.bool()")
            if mask.layout != torch.strided:
                raise TypeError(
                    f"a mask of valid tokens is a dense tensor, got one of {mask.layout}. Use mask.to_dense()"
                )
            if not mask.ndim:
                raise ValueError(f"a mask has one entry for each token, got the single value {bool(mask)}")
        # Hugging Face's [batch, 1, 1, length] masks say the same as [batch, length].
        self.masks = [mask.reshape([mask.shape[0], *(n for n in mask.shape[1:] if n != 1)]) for mask in masks]
        self.asked = self.taken = False

    def __enter__(self) -> "valid_tokens":
        _note(self.masks)
        self._own = _open.contexts
        self._own.append(self)
        if self._own is not _everywhere:
            _everywhere.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._own.remove(self)
        if self._own is not _everywhere:
            _everywhere.remove(self)
        if error is None and self.asked and not self.taken:
            shapes = ", ".join(str(tuple(mask.shape)) for mask in self.masks)
            warnings.warn(
                f"no monitored layer has tokens that a mask of shape {shapes} fits, so padding counted: a mask has the "
                "shape of the norm's input without the channel axis",
                stacklevel=2,
            )


_unasked = 10  # how many more contexts are looked at
_noted: list[tuple[tuple[int, ...], Tensor]] = []  # shapes of masks on a GPU, and the share of tokens that each keeps


def _note(masks: Sequence[Tensor]) -> None:
    """Ask about the first masks. Of those on a GPU only note the share, because to read it waits for the device."""
    global _unasked
    if not _unasked or torch.compiler.is_compiling():
        return
    if any(mask.is_cuda for mask in masks) and torch.cuda.is_current_stream_capturing():
        return
    _unasked -= 1
    for mask in masks:
        if mask.numel() and not mask.is_meta:
            _noted.append((tuple(mask.shape), mask.sum() / mask.numel()))
    if all(mask.device.type == "cpu" for mask in masks):
        ask_about_masks(stacklevel=4)


def ask_about_masks(stacklevel: int = 2) -> None:
    """Ask once about a mask that leaves out more than half of a batch: it may say which tokens are padding.

    This reads from the device, so it is called where the host waits for it anyway.
    """
    global _unasked
    while _noted:
        shape, share = _noted.pop(0)
        kept = float(share)
        if kept < 1:
            _unasked = 0  # which of its tokens are padding is known now
            _noted.clear()
        if kept < 0.5:
            warnings.warn(
                f"the first padded mask, of shape {shape}, leaves out {100 * (1 - kept):.0f} % of the tokens. Does "
                "True mean valid token there? If it means padding, as in PyTorch's key_padding_mask, pass ~mask",
                stacklevel=stacklevel,
            )


def any_mask_is_active() -> bool:
    """Whether a context of `valid_tokens` is open in this thread."""
    return bool(_open.contexts)


def mask_for(tokens: torch.Size, name: str) -> Tensor | None:
    """Give the active mask that fits a layer's tokens, in their shape; None when no active mask concerns the layer.

    Args:
        tokens: the shape of the layer's input without the channels.
        name: of the layer, for the message.

    Raises:
        ValueError: a mask has as many axes as the tokens, but is transposed or of another length.
    """
    contexts = _open.contexts
    masks = [mask for context in reversed(contexts) for mask in context.masks]
    if not masks:
        return None
    if not torch.compiler.is_compiling():
        for context in contexts:
            context.asked = True
    for mask in masks:
        fitted = _fit(mask, tokens)
        if fitted is not None:
            if not torch.compiler.is_compiling():
                for context in contexts:
                    context.taken = True
            return fitted
    for mask in masks:
        transposed = mask.ndim == len(tokens) > 1 and mask.shape == tokens[::-1]
        if transposed or (mask.ndim == len(tokens) > 1 and mask.shape[0] == tokens[0]):
            for context in contexts:
                context.taken = True  # this error says it; a warning at the end would say it twice
            hint = (
                "Give its transpose" if transposed else "Give a mask of that shape (a class token needs an entry, too)"
            )
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, but the input of norm {name!r} has tokens of shape "
                f"{tuple(tokens)}: a mask has the input's shape without the channel axis. {hint}, or exclude the layer."
            )
    return None


def _fit(mask: Tensor, tokens: torch.Size) -> Tensor | None:
    if mask.shape == tokens:
        return mask
    if len(tokens) > mask.ndim and mask.shape == tokens[: mask.ndim]:  # [batch, length, heads]
        return mask.reshape(*mask.shape, *[1] * (len(tokens) - mask.ndim)).expand(tokens)
    if len(tokens) > mask.ndim == 2 and mask.shape == (tokens[0], tokens[-1]):  # [batch, heads, length]
        return mask.reshape(mask.shape[0], *[1] * (len(tokens) - 2), mask.shape[1]).expand(tokens)
    if len(tokens) == 1 and mask.numel() == tokens[0]:
        return mask.reshape(-1)
    return None


def check_mask(mask: Any) -> None:
    """Check an argument ``mask=``.

    Raises:
        TypeError: it is neither a key, an index nor a function.
    """
    if callable(mask):
        check_function("mask", mask, "batch")
    elif mask is not None and not isinstance(mask, str) and not is_whole(mask):
        raise wrong_type("mask", mask, "a key, an attribute or an index of the batch, or a function of the batch")


def masks_of(batch: Any, mask: MaskOfBatch) -> Sequence[Tensor]:
    """Give a batch's masks as the argument ``mask=`` names them.

    Args:
        batch: as it comes from the loader.
        mask: a key, an attribute or an index of the batch, or a function of the batch; None: the batch has no mask.

    Raises:
        TypeError: the entry, or what the function returned, is neither a tensor nor a list.
        ValueError: the batch has no such entry, or the function returned None.
    """
    if mask is None:
        return ()
    if callable(mask):
        masks = mask(batch)
    else:
        try:
            masks = _entry(batch, mask)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            names = _names(batch)
            hint = nearest(mask, filter(_is_name, names)) or "."
            has = f"has {names}" if names else f"is a {type(batch).__name__}"
            raise ValueError(
                f"mask={mask!r} is no entry of the batch, which {has}{hint} Name the entry that says which tokens are "
                "valid, or give a function of the batch"
            ) from error
    if masks is None:
        given = "the mask function returned None" if callable(mask) else f"mask={mask!r} is None in this batch"
        raise ValueError(f"{given}; it is to be a bool tensor, True = valid token")
    if not isinstance(masks, Tensor):
        if not isinstance(masks, list | tuple):
            given = f"mask={shown(mask)} gives {shown(masks)} of type {type(masks).__name__}"
            raise TypeError(f"{given}. It is to give a bool tensor, True = valid token, or a list of them")
        return masks
    # A key names what the tokenizer made, often 0 and 1. A function's answer is used as it is.
    return (masks if callable(mask) else masks.bool(),)


def _entry(batch: Any, name: Any) -> Any:
    """Read a key or an index; of a named tuple, a dataclass or another object, the attribute."""
    by_attribute = isinstance(name, str) and not isinstance(batch, Mapping | Tensor) and hasattr(batch, name)
    return getattr(batch, name) if by_attribute else batch[name]


def _names(batch: Any) -> list[Any]:
    """List the entries of a batch; none where they have no names."""
    if isinstance(batch, Mapping):
        return list(batch)
    return list(getattr(batch, "_fields", ())) or [name for name in getattr(batch, "__dict__", ()) if name[0] != "_"]


def _is_name(key: Any) -> bool:
    return isinstance(key, str)
