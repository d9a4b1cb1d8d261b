"""`sigma_reparametrize`: each weight gets a learnable largest singular value, so that attention logits stay bounded."""

from functools import partial

from torch import nn

from stabnorm._models.names import Patterns
from stabnorm.nn.mixed_in import mix_in, mixins_of
from stabnorm.nn.sigma_reparam import SigmaReparam
from stabnorm.remedies._weights import Weight, changeable, linear_weights
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen


def sigma_reparametrize(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> RemedyReport:
    r"""Give the weight of every linear layer a learnable largest singular value, in place.

    .. math:: \hat W = g\, \frac{\sigma_0}{\sigma(W)}\, W

    The logits of an attention head cannot grow faster than the gains g of its queries and keys, whatever the weights
    do, so that its entropy keeps a lower bound. :math:`\sigma_0` is the largest singular value at the call and g begins
    with 1. So the model computes the same as before, up to rounding; the published converter draws new weights instead.
    Queries, keys and values that are one weight have a gain each. Every forward in training makes one power iteration
    from where the last one ended.

    The parameters keep their names, and a checkpoint from before the call loads. The gains are new parameters, so call
    this before the optimizer is built; `no_decay_groups` keeps weight decay off them. `fold_norms` writes
    :math:`\hat W` into the weights, exactly.

    Args:
        model: any module.
        include: a regular expression, or several, searched for in the names of `nn.Linear`, `nn.MultiheadAttention` and
            Hugging Face's Conv1D. Default: all of them.
        exclude: the same, for layers to leave alone; it wins over `include`. Default: none.

    Returns:
        What was changed, and what was left and why.

    Raises:
        ValueError: a pattern is invalid or matches no linear layer.
        StabNormError: no layer can be changed, or the model is compiled, scripted or wrapped.

    Source: arXiv:2303.06296, Stabilizing Transformer Training by Preventing Attention Entropy Collapse.

    >>> import torch
    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval(), torch.randn(3, 4)
    >>> before = model(x)
    >>> print(sigma_reparametrize(model))
    sigma_reparametrize: 2 changed; outputs are the same up to rounding
      0  weight has a learnable largest singular value
      2  weight has a learnable largest singular value
    >>> torch.allclose(model(x), before, rtol=1e-6, atol=1e-6)
    True
    """
    check_remedied(model)
    weights = {weight.name: weight for weight in linear_weights(model)}
    wanted = [weights[name] for name in chosen("linear layers", weights, include, exclude)]
    changed, left = changeable(model, wanted, _obstacle)
    steps = []
    for weight in changed:
        each = "queries, keys and values have" if weight.parts == 3 else f"{weight.attribute} has"
        action = f"{each} a learnable largest singular value" + " each" * (weight.parts == 3)
        steps.append(Step(weight.name, action, partial(_reparametrize, weight), (weight.module,)))
    return carried_out("sigma_reparametrize", model, steps, left, "1e-6")


def _obstacle(weight: Weight) -> str | None:
    if SigmaReparam in mixins_of(weight.module):
        return "it is reparametrized already"
    if not bool(weight.parameter.any()):
        return "its weight is zero, which has no direction to scale"
    return None


def _reparametrize(weight: Weight) -> None:
    module = weight.module
    mix_in(SigmaReparam, module, (weight.attribute,))
    assert isinstance(module, SigmaReparam)
    module.adopt(weight.attribute, weight.parts, weight.transposed)
