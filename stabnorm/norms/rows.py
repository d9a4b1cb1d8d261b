"""A norm's input as rows of channels, and back."""

import torch
from torch import Tensor


def as_rows(x: Tensor, channel_dim: int, feature_dims: int = 1) -> Tensor:
    """Give ``x`` as ``[R, C]`` with the channels last; a view where the layout allows.

    >>> as_rows(torch.zeros(2, 3, 4, 5), channel_dim=1).shape
    torch.Size([40, 3])
    """
    if channel_dim not in (-1, x.ndim - 1):
        x = x.movedim(channel_dim % x.ndim, x.ndim - 1)  # not negative: the older ONNX exporter writes axes as they are
    features = x.shape[x.ndim - feature_dims :].numel()
    return x.reshape(x.numel() // max(features, 1), features)


def from_rows(rows: Tensor, shape: torch.Size, channel_dim: int, feature_dims: int = 1) -> Tensor:
    """Undo `as_rows`: give the tensor of this shape whose rows these are.

    >>> x = torch.randn(2, 3, 4)
    >>> torch.equal(from_rows(as_rows(x, 1), x.shape, 1), x)
    True
    """
    if feature_dims > 1 or channel_dim in (-1, len(shape) - 1):
        return rows.reshape(shape)
    tokens = tokens_of(shape, channel_dim)
    return rows.reshape(*tokens, rows.shape[1]).movedim(len(shape) - 1, channel_dim % len(shape))


def tokens_of(shape: torch.Size, channel_dim: int, feature_dims: int = 1) -> torch.Size:
    """Give the shape of an input without its channels: the shape that a mask of valid tokens has.

    >>> tokens_of(torch.Size([2, 8, 5]), channel_dim=1), tokens_of(torch.Size([2, 5, 3, 4]), -1, feature_dims=2)
    (torch.Size([2, 5]), torch.Size([2, 5]))
    """
    if feature_dims > 1:
        return shape[: len(shape) - feature_dims]
    axis = channel_dim % len(shape)
    return shape[:axis] + shape[axis + 1 :]
