"""How the scale of the tokens grows from layer to layer: by a factor, or by an amount.

Pre-LN lets the variance of the residual stream grow exponentially with depth, Peri-LN linearly (arXiv 2502.02732), and
in exponential growth deep layers turn into identities (the curse of depth, arXiv 2502.05795). Each layer carries the
fit over itself and all layers before it that are as wide, in module order, so that the last one carries the model's
and the others say where it began. Narrow it down with `include` where norms of other streams are as wide.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stabnorm.functional.moments import STD_MEAN
from stabnorm.monitor.past import Moments, Past
from stabnorm.statistic import TOKENS, Statistic, per_step

_LEAST_LAYERS = 3
_NEGLIGIBLE = 1e-10  # a relative error of 1e-5, squared: what two fits leave of float32 is no difference


class Growth(NamedTuple):
    """Two fits of the token variance v over depth l, each ``[L]``; NaN for fewer than three layers.

    Attributes:
        rate: of log v = a + rate l.
        exponential: mean square error of that, in log v.
        linear: mean square relative error of v = b + k l: both are relative errors, and can be compared.
    """

    rate: Tensor
    exponential: Tensor
    linear: Tensor


def _alike(now: Moments) -> tuple[Tensor, Tensor]:
    """Whether layer j is no deeper than i and as wide, ``[L, L]``, and each one's place among those, ``[L]``."""
    channels = now.layout.channels
    alike = (channels[:, None] == channels).tril().to(channels.dtype)
    return alike, alike.sum(-1)


@per_step
def growth(now: Moments) -> Growth:
    """Least squares in closed form, for all layers at once."""
    log = 2 * now.token[:, STD_MEAN].log()
    known = now.ran & torch.isfinite(log)
    alike, depth = _alike(now)
    weights = alike * known
    count = weights.sum(-1)

    def line(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Slope, and mean square of what it leaves, for weights and values ``[L, L]``."""
        total = weights.sum(-1, keepdim=True)
        x = depth - (weights * depth).sum(-1, keepdim=True) / total
        y = values - (weights * values).sum(-1, keepdim=True) / total
        slope = (weights * x * y).sum(-1) / (weights * x * x).sum(-1)
        return slope, (weights * (y - slope[:, None] * x).square()).sum(-1) / count

    logs = torch.where(known, log, 0)
    rate, exponential = line(weights, logs.expand_as(weights))
    usual = (weights * logs).sum(-1, keepdim=True) / count[:, None]
    relative = torch.where(weights > 0, (logs - usual).exp(), 1)  # the variances, free of their unit
    _, linear = line(weights / relative.square(), relative)
    enough = known & (count >= _LEAST_LAYERS)
    return Growth(*(torch.where(enough, t, torch.nan) for t in (rate, exponential, linear)))


def _depth_ratio(now: Moments, past: Past) -> Tensor:
    del past
    alike, _ = _alike(now)
    first = (alike * now.ran).argmax(-1)  # 1 comes first at the first layer that ran
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
        "depth_ratio", "S1", "token_std_mean over that of the first layer as wide as this one",
        "depth", "1", _SOURCE, TOKENS, _depth_ratio, needs="tokens",
    ),
    Statistic(
        "depth_growth_rate", "S1", "r of the fit log v_l = a + r l, v_l = token_std_mean^2, over the layers up to this "
        "one that are as wide; 0: no growth; the last layer's is the model's; NaN for fewer than three",
        "depth", "1", _SOURCE, TOKENS, _depth_growth_rate, needs="tokens",
    ),
    Statistic(
        "depth_growth_shape", "S1", "E_lin / (E_lin + E_exp), mean square errors of the fit v_l = b + k l, relative "
        "to v_l, and of that one: 0 linear, 1 exponential; says nothing where the rate is about 0",
        "depth", "1", _SOURCE, TOKENS, _depth_growth_shape, needs="tokens",
    ),
)  # fmt: skip
