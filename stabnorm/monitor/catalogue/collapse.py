"""C1: whether all tokens become alike.

Beside it the literature has the linearity of a block, the share of its output that a linear map of its input reproduces
(arXiv 2405.12250). It is not here: it needs the covariances of all pairs of channels, which cost as much as a linear
layer, and it told little in our faulty trainings (`benchmarks.faulty_trainings`). There it is between 0.86 and 1 in
healthy blocks and in most broken ones, and where one of them stands out, other statistics had said so before.
"""

import torch
from torch import Tensor

from stabnorm.monitor.past import Moments, Past
from stabnorm.statistic import Statistic


def _token_cosine(now: Moments, past: Past) -> Tensor:
    r"""Return the mean over pairs from sums over channels, because the sum over all pairs is one over channels.

    .. math:: \sum_{i \ne j} n_i \cdot n_j = \Big|\sum_i n_i\Big|^2 - \sum_i |n_i|^2
    """
    del past
    of_mean, spread = now.mean_over_channels(now.mean_n.square()), now.mean_over_channels(now.var_n)
    others = (now.count - 1).to(spread.dtype)
    known = (now.count > 1) & (of_mean + spread > 0)  # a batch norm has no normalised tokens
    return torch.where(known, (of_mean - spread / others) / (of_mean + spread), torch.nan)


COLLAPSE = (
    Statistic(
        "token_cosine", "C1", "mean over pairs of tokens of n_i . n_j, over mean_n |n|^2, n the normalised input "
        "before gain and bias: the mean cosine of two tokens, without their means in a LayerNorm; 0: they have nothing "
        "in common, 1: they are all the same; NaN for BatchNorm and for one token",
        "token", "1", "anisotropy, arXiv 1909.00512; rank collapse, arXiv 2103.03404", "free beside affine_residual",
        _token_cosine, needs="normalized", bad="rises towards 1",
        advice="all tokens look the same to it: lower the learning rate, and look at what the blocks before it add",
    ),
)  # fmt: skip
