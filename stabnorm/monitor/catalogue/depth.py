"""How the scale of the tokens grows from layer to layer: exponentially or linearly.

In a Pre-LN model the variance of the residual stream grows exponentially with depth, in a Peri-LN model linearly
(arXiv 2502.02732). With exponential growth, deep layers become identities (the curse of depth, arXiv 2502.05795). The
value of a layer is the fit over this layer and all layers of the same width before it, in module order. So the value of
the last layer describes the model, and the others show where the growth began. If norms of other streams have the same
width, choose layers with `include`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stabnorm.functional.moments import STD_MEAN
from stabnorm.monitor.past import Moments, Past
from stabnorm.statistic import TOKENS, Statistic, per_step

_LEAST_LAYERS = 3
_NEGLIGIBLE = 1e-10  # a relative error of 1e-5, squared: smaller errors of two fits are rounding


class Growth(NamedTuple):
    """Two fits of the token variance v over depth l, each ``[L]``; NaN for fewer than three layers.

    Attributes:
        rate: the rate of the fit log v = a + rate l.
        exponential: mean square error of this fit, in log v.
        linear: mean square relative error of the fit v = b + k l. Both errors are relative, so they can be compared.
    """

    rate: Tensor
    exponential: Tensor
    linear: Tensor


def _alike(now: Moments) -> tuple[Tensor, Tensor]:
    """Return whether layer j is not deeper than i and has its width, ``[L, L]``, and the number of such j, ``[L]``."""
    channels = now.layout.channels
    alike = (channels[:, None] == channels).tril().to(channels.dtype)
    return alike, alike.sum(-1)


@per_step
def growth(now: Moments) -> Growth:
    """Fit both by least squares in closed form, for all layers at once."""
    log = 2 * now.token[:, STD_MEAN].log()
    known = now.ran & torch.isfinite(log)
    alike, depth = _alike(now)
    weights = alike * known
    count = weights.sum(-1)

    def line(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slope and the mean square of the residuals, for weights and values ``[L, L]``."""
        total = weights.sum(-1, keepdim=True)
        x = depth - (weights * depth).sum(-1, keepdim=True) / total
        y = values - (weights * values).sum(-1, keepdim=True) / total
        slope = (weights * x * y).sum(-1) / (weights * x * x).sum(-1)
        return slope, (weights * (y - slope[:, None] * x).square()).sum(-1) / count

    logs = torch.where(known, log, 0)
    rate, exponential = line(weights, logs.expand_as(weights))
    usual = (weights * logs).sum(-1, keepdim=True) / count[:, None]
    relative = torch.where(weights > 0, (logs - usual).exp(), 1)  # the variances, without their unit
    _, linear = line(weights / relative.square(), relative)
    enough = known & (count >= _LEAST_LAYERS)
    return Growth(*(torch.where(enough, t, torch.nan) for t in (rate, exponential, linear)))


def _depth_ratio(now: Moments, past: Past) -> Tensor:
    del past
    alike, _ = _alike(now)
    first = (alike * now.ran).argmax(-1)  # the first layer that ran
    scale = now.token[:, STD_MEAN]
    return scale / scale[first]


def _depth_growth_rate(now: Moments, past: Past) -> Tensor:
    del past
    return growth(now).rate


def _depth_growth_shape(now: Moments, past: Past) -> Tensor:
    del past
    fit = growth(now)
    return (fit.linear + _NEGLIGIBLE) / (fit.linear + fit.exponential + 2 * _NEGLIGIBLE)


_SOURCE = "Peri-LN, arXiv 2502.02732; curse of depth, arXiv 2502.05795"

DEPTH = (
    Statistic(
        "depth_ratio", "S1", "token_std_mean over that of the first layer of the same width",
        "depth", "1", _SOURCE, TOKENS, _depth_ratio, needs="tokens",
    ),
    Statistic(
        "depth_growth_rate", "S1", "r of the fit log v_l = a + r l, v_l = token_std_mean^2, over the layers of the "
        "same width up to this one; 0: no growth; that of the last layer is the model's; NaN for fewer than three",
        "depth", "1", _SOURCE, TOKENS, _depth_growth_rate, needs="tokens",
        advice="its scale grows with depth, so that deep blocks change little: begin again with "
        "stabnorm.remedies.scale_by_depth",
    ),
    Statistic(
        "depth_growth_shape", "S1", "E_lin / (E_lin + E_exp), mean square errors of the fit v_l = b + k l, relative "
        "to v_l, and of the fit above: 0 linear, 1 exponential; without meaning if the rate is about 0",
        "depth", "1", _SOURCE, TOKENS, _depth_growth_shape, needs="tokens",
    ),
)  # fmt: skip
