"""`peri_norm`: normalise what each residual branch adds, so that the variance grows linearly with depth at most."""

from functools import partial
from typing import Any

from torch import nn

from stabnorm._checks import check_choice
from stabnorm._models.names import Patterns
from stabnorm._models.tree import Tree
from stabnorm.nn.added_norm import NormedOutput, NormKind, new_norm
from stabnorm.nn.mixed_in import mix_in, mixins_of
from stabnorm.remedies._branches import residual_branches
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen


def peri_norm(
    model: nn.Module, example: Any, include: Patterns = None, exclude: Patterns = None, *, norm: NormKind = "rms"
) -> RemedyReport:
    r"""Put a norm behind the last layer of each residual branch (Peri-LN), in place.

    .. math:: x_{\ell+1} = x_\ell + \mathrm{norm}_{out}(F_\ell(\mathrm{norm}_{in}(x_\ell)))

    Every branch then adds a variance of about 1, so that the variance of the stream grows linearly with depth and no
    branch can drown the others. The norm becomes the child `output_norm` of the branch's last layer, whose parameters
    keep their names; of `nn.MultiheadAttention` it normalises the output.

    It changes the outputs: apply it to a model that is not trained yet. `convert_norms(model, include="output_norm")`
    switches the new norms, and `fold_norms` then folds them backward into the layers that they are children of. A norm
    that is not switched stays.

    Args:
        model: a pre-norm model; each branch ends in a linear or convolution layer.
        example: the model's arguments, as for `fold_norms`. A copy of the model runs on it, which shows the branches; a
            branch counts when a norm reads the sum behind it.
        include: a regular expression, or several, searched for in the names of the branches' last layers. Default: all.
        exclude: the same, for branches to leave alone; it wins over `include`. Default: none.
        norm: "rms" or "layer". Default: "rms".

    Returns:
        What was changed, and what was left and why.

    Raises:
        ValueError: a pattern is invalid or matches no branch, `norm` is unknown, or the example does not run.
        StabNormError: there is no branch, none can be changed, or the model is compiled, scripted or wrapped.

    Source: arXiv:2502.02732, Peri-LN.

    >>> import torch
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(8), enable_nested_tensor=False)
    >>> model = nn.Sequential(nn.Linear(8, 8), encoder)
    >>> print(peri_norm(model, torch.randn(1, 3, 8)))
    peri_norm: 2 changed; outputs are changed
      1.layers.0.self_attn  output normalised (rms, 8 channels)
      1.layers.0.linear2    output normalised (rms, 8 channels)
    """
    check_choice("norm", norm, ("rms", "layer"))
    check_remedied(model)
    tree, branches = Tree(model), {}
    for branch in residual_branches(model, example):
        around = tree.parents[id(branch.module)][0][0]
        inside = isinstance(around, nn.MultiheadAttention)  # which reads the weights of the layer and never calls it
        name = branch.name.rpartition(".")[0] if inside else branch.name
        branches[name] = (around if inside else branch.module, branch.module)
    steps, left = [], {}
    for name in chosen("residual branches", branches, include, exclude):
        module, last = branches[name]
        weight = last._parameters["weight"]
        assert weight is not None
        if NormedOutput in mixins_of(module):
            left[name] = "its output is normalised already"
        elif not isinstance(last, nn.Linear):
            left[name] = f"{type(last).__name__} is no nn.Linear"
        else:
            action = f"output normalised ({norm}, {len(weight)} channels)"
            steps.append(Step(name, action, partial(add_output_norm, module, norm, len(weight)), (module,)))
    return carried_out("peri_norm", model, steps, left, "no")


def add_output_norm(module: nn.Module, kind: NormKind, width: int) -> None:
    """Normalise the output of a module by a new norm, which becomes its child `output_norm`."""
    made = new_norm(kind, width, module)
    mix_in(NormedOutput, module)
    module.output_norm = made
