"""`RepeatedMoments`: the short way to `accumulate_moments_` for a layer that gets inputs of one shape.

A hook runs between two large operations, when the caches hold nothing of it: then every function on its way costs
microseconds. So what is the same at each forward is looked at once. The short way takes a plain tensor on a CPU of the
shape and dtype of the one before, where C++ runs and no mask is active; all else goes the long way.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stabnorm._models.masks import any_mask_is_active
from stabnorm.functional import Kind, RawMoments
from stabnorm.ops.dispatch import one_at_a_time, times_forgotten
from stabnorm.ops.moments import add_moments_, is_counted

if TYPE_CHECKING:
    from stabnorm.ops.cpp.moments import PreparedMoments


class RepeatedMoments:
    """The short way of one layer; it is closed until `remember` opens it."""

    def __init__(self) -> None:
        self._prepared: PreparedMoments | None = None
        self._shape, self._dtype = torch.Size(), torch.float32
        self._chosen_at = -1  # for which choice of backends it is open

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any], normalized: bool) -> Tensor | None:
        """Add the moments of a call's input and return it; None if the long way must look at it.

        Args:
            args: positional arguments of the call.
            kwargs: its keyword arguments.
            normalized: whether the moments of the normalised input are gathered, too.
        """
        prepared = self._prepared
        if prepared is None or len(args) != 1 or kwargs or self._chosen_at != times_forgotten():
            return None
        x = args[0]
        # The checks of the shape come last, because a nested tensor has none.
        if type(x) is not Tensor or not x.is_cpu or x.layout is not torch.strided or x.is_nested:
            return None
        if x.shape != self._shape or x.dtype is not self._dtype or not x.is_contiguous():
            return None
        if any_mask_is_active() or torch._C._functorch.maybe_current_level() is not None:
            return None
        if is_counted():
            with one_at_a_time:
                prepared.add(x, normalized)
        return x

    def remember(
        self, x: Tensor, valid: Tensor | None, into: RawMoments, kind: Kind, channel_dim: int, eps: float, tokens: bool
    ) -> None:
        """Open the short way for inputs like this one, which went the long way, if it can take them.

        Args:
            x: the input.
            valid: which of its tokens are valid; None means all.
            into: the layer's accumulator.
            kind: what the layer is.
            channel_dim: the axis of x that holds the channels.
            eps: the layer's epsilon.
            tokens: whether the statistics of tokens are gathered.
        """
        self._prepared = None
        last = channel_dim in (-1, x.ndim - 1)
        if type(x) is not Tensor or not x.is_cpu or not last or valid is not None or not x.is_contiguous():
            return
        if x.numel() == 0 or add_moments_.chosen(x) != "cpp":
            return
        from stabnorm.ops.cpp.moments import KINDS, PreparedMoments

        if kind in KINDS:
            rows = x.detach().view(-1, into.channel.shape[-1])
            self._prepared = PreparedMoments(rows, into, kind, eps, tokens)
            self._shape, self._dtype, self._chosen_at = x.shape, x.dtype, times_forgotten()
