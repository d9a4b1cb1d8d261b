"""Streaming least squares per channel: fit the affine map from a norm's input to the output that it should have."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stabnorm._models.ranks import gather_over_ranks
from stabnorm.errors import StabNormError
from stabnorm.functional import RawMoments, channel_moments, explained_share, merge_moments_
from stabnorm.functional.moments import CHANNEL_ROWS, COV_XN, REST_N, REST_X, SHIFT_N, SHIFT_X, TOKEN_ROWS, VAR_N, VAR_X

ROUNDING = 8.0  # units in the last place: a channel that varies by less counts as constant


class Seen(NamedTuple):
    """One call of a norm: input and output as ``[R, C]``, and which rows are valid, ``[R]`` bool or None for all."""

    read: Tensor
    written: Tensor
    valid: Tensor | None


@dataclass(frozen=True)
class Affine:
    """A least squares fit per channel, y = scale x + shift; float64.

    Args:
        scale: ``[C]``; 0 for a channel whose input does not vary.
        shift: ``[C]``; 0 for a fit without a shift.
        mean: ``[C]``, mean of the input; 0 for a fit without a shift.
        square: ``[C]``, mean square deviation of the input from `mean`.
        residual: share of the output's variance that no such map reproduces, as a mean over channels, in [0, 1].
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    square: Tensor
    residual: float


class ChannelSums:
    """Streaming means, variances and covariance of a norm's input and of the output that it should have.

    Example:
        >>> sums, x = ChannelSums(3), torch.randn(100, 3)
        >>> for part in x.split(30):
        ...     sums.add(Seen(part, 2 * part + 1, None), 2 * part + 1)
        >>> fit = sums.affine()
        >>> [round(float(value), 6) for value in fit.scale], round(fit.residual, 6)
        ([2.0, 2.0, 2.0], 0.0)
    """

    def __init__(self, num_features: int, device: torch.device | None = None) -> None:
        self._total = _moments(num_features, device)
        self._digit = 0.0  # the largest machine epsilon among the dtypes of the inputs

    def add(self, seen: Seen, wanted: Tensor) -> None:
        """Add one call of the norm, and the output that it should have, ``[R, C]``."""
        if seen.read.shape != wanted.shape:
            raise StabNormError(
                f"the original's norm wrote {tuple(wanted.shape)} where its successor read {tuple(seen.read.shape)}: "
                "the two models do not run alike on one batch. Does the model draw random numbers in eval mode?"
            )
        self._digit = max(self._digit, torch.finfo(seen.read.dtype).eps)
        count, channel = channel_moments(seen.read.double(), wanted.double(), seen.valid)
        merge_moments_(self._total, RawMoments(count, channel, self._total.token.clone()))

    def over_ranks(self) -> RawMoments:
        """Return the sums of all ranks, merged by Chan's rule; they are the same on every rank."""
        packed = torch.cat([self._total.seen.double().reshape(1), self._total.channel.flatten()])
        merged = _moments(self._total.channel.shape[1], packed.device)
        for of_rank in gather_over_ranks(packed):
            channel = of_rank[1:].view(CHANNEL_ROWS, -1)
            merge_moments_(merged, RawMoments(of_rank[0].long(), channel, merged.token.clone()))
        return merged

    def affine(self, *, center: bool = True) -> Affine:
        """Fit the map to what was added on all ranks; `center=False` fits it without a shift.

        Raises:
            StabNormError: there was no valid token, or a value that is not finite.
        """
        moments = self.over_ranks()
        channel = moments.channel
        if not moments.seen:
            raise StabNormError("it read no valid token")
        if not torch.isfinite(channel[: VAR_N + 1]).all():
            raise StabNormError("it read or wrote something that is not finite")
        mean_x, mean_y = channel[SHIFT_X] + channel[REST_X], channel[SHIFT_N] + channel[REST_N]
        var_x, cov, var_y = channel[VAR_X], channel[COV_XN], channel[VAR_N]
        power = var_x + mean_x.square()
        if not center:
            var_x, cov, var_y = power, cov + mean_x * mean_y, var_y + mean_y.square()
            mean_x = torch.zeros_like(mean_x)
        # A constant input varies by its rounding, which says nothing about the output.
        varies = var_x > (ROUNDING * self._digit) ** 2 * power
        scale = torch.where(varies, cov / torch.where(varies, var_x, 1), 0)
        explained = explained_share(var_x, cov, var_y, mean_y, scale)
        shift = mean_y - scale * mean_x if center else torch.zeros_like(scale)
        square = torch.where(varies, var_x, 1)
        return Affine(scale, shift, mean_x, square, float((1 - explained.mean()).clamp(min=0)))


def _moments(num_features: int, device: torch.device | None) -> RawMoments:
    return RawMoments(
        torch.zeros((), dtype=torch.int64, device=device),
        torch.zeros(CHANNEL_ROWS, num_features, dtype=torch.float64, device=device),
        torch.zeros(TOKEN_ROWS, dtype=torch.float64, device=device),
    )
