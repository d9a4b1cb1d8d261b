"""`scale_residuals`: multiply each residual branch by a number below 1, or by a learnable one that begins with 0."""

from functools import partial
from math import sqrt
from typing import Any, Literal, get_args

from torch import nn

from stabnorm._checks import check_choice, check_number
from stabnorm._models.names import Patterns
from stabnorm._models.tree import Tree
from stabnorm.nn.mixed_in import mix_in, mixins_of
from stabnorm.nn.scaled_weights import ScaledWeights
from stabnorm.remedies._branches import residual_branches
from stabnorm.remedies._weights import tensor_obstacle
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen

Rule = Literal["1/n", "1/sqrt(n)", "skipinit"]


def scale_residuals(
    model: nn.Module,
    example: Any,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    scale: Rule | float = "1/sqrt(n)",
) -> RemedyReport:
    r"""Scale what each residual branch adds, in place.

    .. math:: x_{\ell+1} = x_\ell + \lambda\, F_\ell(x_\ell), \qquad \lambda = \frac{1}{n},\ \frac{1}{\sqrt n}

    With n branches and 1/n a stack of equal linear branches grows by less than e in all, where it would grow by
    :math:`2^n`. The scale multiplies weight and bias of the last layer of each branch, for whoever reads them; the
    parameters keep their numbers and names, and `fold_norms` writes the scale into them, exactly.

    It changes the outputs: apply it to a model that is not trained yet. In our study (docs/remedies.md) 1/sqrt(n) had
    the lowest loss, and 1/n cost some.

    Args:
        model: a pre-norm model; each branch ends in a linear or convolution layer.
        example: the model's arguments, as for `fold_norms`. A copy of the model runs on it, which shows the branches; a
            branch counts when a norm reads the sum behind it.
        include: a regular expression, or several, searched for in the names of the branches' last layers. Default: all.
        exclude: the same, for branches to leave alone; it wins over `include`. Default: none.
        scale: "1/n" and "1/sqrt(n)", n the number of branches that are scaled; a number, such as the 0.1 to 0.3 of
            Inception-v4; or "skipinit", a learnable scalar for each branch that begins with 0, so that the model begins
            as its trunk. Default: "1/sqrt(n)".

    Returns:
        What was changed, and what was left and why.

    Raises:
        ValueError: a pattern is invalid or matches no branch, the scale is unknown or not above 0, or the example does
            not run.
        StabNormError: there is no branch, none can be scaled, or the model is compiled, scripted or wrapped.

    Source: arXiv:2510.03470 (1/n and 1/sqrt(n)), 1602.07261 (Inception-v4), 2002.10444 (SkipInit).

    >>> import torch
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    >>> model = nn.Sequential(nn.Linear(8, 8), model)
    >>> print(scale_residuals(model, torch.randn(1, 3, 8), scale="1/n"))
    scale_residuals: 4 changed; outputs are changed
      1.layers.0.self_attn.out_proj  output multiplied by 0.25
      1.layers.0.linear2             output multiplied by 0.25
      1.layers.1.self_attn.out_proj  output multiplied by 0.25
      1.layers.1.linear2             output multiplied by 0.25
    """
    if isinstance(scale, str):
        check_choice("scale", scale, get_args(Rule))
    else:
        check_number("scale", scale, above=0.0)
    check_remedied(model)
    branches = {branch.name: branch.module for branch in residual_branches(model, example)}
    names = chosen("residual branches", branches, include, exclude)
    tree, left = Tree(model), {}
    for name in names:
        scaled = "it is scaled already" if ScaledWeights in mixins_of(branches[name]) else None
        why = scaled or tensor_obstacle(branches[name], "weight", tree)
        if why:
            left[name] = why
    wanted = [name for name in names if name not in left]
    n = max(len(wanted), 1)
    factor = (
        {"1/n": 1 / n, "1/sqrt(n)": 1 / sqrt(n), "skipinit": 0.0}[scale] if isinstance(scale, str) else float(scale)
    )
    learnable = scale == "skipinit"
    action = "output multiplied by a learnable 0" if learnable else f"output multiplied by {factor:.4g}"
    steps = [
        Step(name, action, partial(_scale, branches[name], factor, learnable), (branches[name],)) for name in wanted
    ]
    return carried_out("scale_residuals", model, steps, left, "no")


def _scale(module: nn.Module, factor: float, learnable: bool) -> None:
    names = tuple(name for name in ("weight", "bias") if module._parameters.get(name) is not None)
    mix_in(ScaledWeights, module, names)
    assert isinstance(module, ScaledWeights)
    module.adopt(factor, learnable)
