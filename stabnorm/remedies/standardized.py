"""`standardize_weights`: micro-batch training with norms that do not depend on the batch needs smooth weights."""

from functools import partial

from torch import nn

from stabnorm._checks import check_number
from stabnorm._models.names import Patterns
from stabnorm.nn.mixed_in import mix_in, mixins_of
from stabnorm.nn.standardized import StandardizedWeights
from stabnorm.remedies._weights import Weight, changeable, convolution_weights
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen


def standardize_weights(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None, *, eps: float = 1e-5
) -> RemedyReport:
    r"""Give the weight of every convolution mean 0 and variance 1 per output channel, in place.

    .. math:: \hat W_o = \frac{W_o - \mathrm{mean}(W_o)}{\sqrt{\mathrm{var}(W_o) + \epsilon}}

    It belongs in front of a norm, which divides the new scale out again, most of all of one that does not read the
    batch (`nn.GroupNorm`, `stabnorm.nn.BatchChannelNorm`): together they train with one or two images per device, where
    batch statistics are too noisy. It changes what the model computes, so apply it before the training.

    The parameters keep their names, and checkpoints load as before. `fold_norms` writes :math:`\hat W` into the
    weights, exactly.

    Args:
        model: any module.
        include: a regular expression, or several, searched for in the names of the convolutions. Default: all.
        exclude: the same, for convolutions to leave alone; it wins over `include`. Default: none.
        eps: added to the variance. Default: 1e-5.

    Returns:
        What was changed, and what was left and why.

    Raises:
        TypeError: an argument has another type.
        ValueError: a pattern is invalid or matches no convolution, or `eps` is out of range.
        StabNormError: no convolution can be changed, or the model is compiled, scripted or wrapped.

    Source: arXiv:1903.10520, Micro-Batch Training with Batch-Channel Normalization and Weight Standardization.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    >>> print(standardize_weights(model))
    standardize_weights: 1 changed; outputs are changed
      0  weight has mean 0 and variance 1 per output channel
    >>> bool(model[0].weight.mean((1, 2, 3)).abs().max() < 1e-6)
    True
    """
    check_remedied(model)
    check_number("eps", eps, least=0)
    weights = {weight.name: weight for weight in convolution_weights(model)}
    wanted = [weights[name] for name in chosen("convolutions", weights, include, exclude)]
    changed, left = changeable(model, wanted, _obstacle)
    action = "weight has mean 0 and variance 1 per output channel"
    steps = [Step(w.name, action, partial(_standardize, w, float(eps)), (w.module,)) for w in changed]
    return carried_out("standardize_weights", model, steps, left, "no")


def _obstacle(weight: Weight) -> str | None:
    if StandardizedWeights in mixins_of(weight.module):
        return "it is standardized already"
    if weight.parameter[0].numel() < 2:
        return "each of its outputs has one weight only, which has no variance"
    return None


def _standardize(weight: Weight, eps: float) -> None:
    module = weight.module
    mix_in(StandardizedWeights, module, (weight.attribute,))
    assert isinstance(module, StandardizedWeights)
    module.standardized_eps, module.standardized_transposed = eps, weight.transposed
