"""`scale_by_depth`: LayerNorm Scaling, which keeps the variance of a pre-norm stack from growing with depth."""

from collections import Counter
from functools import partial
from math import sqrt

from torch import nn

from stabnorm._models.names import Patterns
from stabnorm._models.tree import Tree
from stabnorm.nn._base import EvalAffineNorm
from stabnorm.nn.mixed_in import MixedIn, mix_in
from stabnorm.nn.scaled_weights import ScaledWeights
from stabnorm.norms import NormLayer, find_norms
from stabnorm.remedies._blocks import block_around, blocks_of
from stabnorm.remedies._weights import tensor_obstacle
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen


def scale_by_depth(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> RemedyReport:
    r"""Divide the output of each pre-norm by the square root of its block's depth (LayerNorm Scaling), in place.

    .. math:: h_\ell = \frac{1}{\sqrt{\ell}}\,\mathrm{norm}(x_\ell), \qquad \ell = 1, 2, \dots

    Deep blocks then add less to the residual stream, whose variance no longer grows exponentially with depth, so that
    deep blocks still change something. All norms of a block are scaled, and the norm behind the last block is not. The
    scale is a constant that no checkpoint holds: gain and bias keep their numbers and are read divided.

    It changes the outputs: apply it to a model that is not trained yet. It is for pre-norm transformers, and its
    authors advise against an initialisation that is scaled by depth as well. `fold_norms` and `fold_gains` write the
    scale into gain and bias, exactly.

    Args:
        model: a model that repeats blocks in an `nn.ModuleList` or `nn.Sequential`.
        include: a regular expression, or several, searched for in the names of the norms in blocks. Default: all of the
            width that most of them have, which leaves out the norms of queries and keys.
        exclude: the same, for norms to leave alone; it wins over `include`. Default: none.

    Returns:
        What was changed, and what was left and why.

    Raises:
        ValueError: a pattern is invalid or matches no norm.
        StabNormError: the model repeats no block that has norms, no norm can be scaled, or the model is compiled,
            scripted or wrapped.

    Source: arXiv:2502.05795, The Curse of Depth in Large Language Models.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> print(scale_by_depth(model, include="norm1"))
    scale_by_depth: 2 changed; outputs are changed
      layers.0.norm1  output divided by sqrt(1)
      layers.1.norm1  output divided by sqrt(2)
    """
    check_remedied(model)
    blocks = blocks_of(model)
    norms = {layer.name: layer for layer in find_norms(model) if block_around(layer.name, blocks)}
    hint = "Blocks are children of one class in an nn.ModuleList or nn.Sequential"
    names = chosen("norms in repeated blocks", norms, include, exclude, hint=hint)
    usual = Counter(norms[name].num_features for name in names).most_common(1)[0][0]
    tree, steps, left = Tree(model), [], {}
    for name in names:
        layer, block = norms[name], block_around(name, blocks)
        assert block is not None
        why = _obstacle(layer, tree)
        if include is None and layer.num_features != usual:
            why = f"it has {layer.num_features} channels, and most norms of the blocks have {usual}"
        if why:
            left[name] = why
            continue
        action = f"output divided by sqrt({block.depth})"
        steps.append(Step(name, action, partial(_scale, layer, 1 / sqrt(block.depth)), (layer.module,)))
    return carried_out("scale_by_depth", model, steps, left, "no")


def _obstacle(layer: NormLayer, tree: Tree) -> str | None:
    module = layer.module
    around = tree.parents[id(module)][0][0]
    if isinstance(module, MixedIn | EvalAffineNorm):
        return "it is scaled already" if isinstance(module, MixedIn) else "its statistics are running ones: scale first"
    if layer.weight_name is None or layer.gain is None:
        return "it has no gain that could be scaled"
    if getattr(around, "norm_first", True) is False:
        return "it normalises the sum (post-norm), and not what a branch reads"
    return tensor_obstacle(module, layer.weight_name, tree)


def _scale(layer: NormLayer, factor: float) -> None:
    module = layer.module
    names = tuple(name for name in (layer.weight_name, layer.bias_name) if name and name in module._parameters)
    mix_in(ScaledWeights, module, names)
    assert isinstance(module, ScaledWeights)
    module.adopt(factor, offset=layer.gain_offset)
