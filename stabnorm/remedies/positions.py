"""`lape`: each block normalises the positions for itself, and its attention reads them beside the tokens."""

from functools import partial

from torch import nn

from stabnorm._models.names import Patterns
from stabnorm.errors import StabNormError
from stabnorm.nn._base import EvalAffineNorm
from stabnorm.nn.added_norm import new_norm
from stabnorm.nn.layer_positions import AddsPositions, HiddenPositions
from stabnorm.nn.mixed_in import MixedIn, mix_in
from stabnorm.norms import NormLayer, find_norms
from stabnorm.remedies._blocks import block_around, blocks_of
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen


def lape(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None, *, positions: str | None = None
) -> RemedyReport:
    r"""Give each block of a vision transformer positions with a LayerNorm of their own (LaPE), in place.

    .. math:: p_\ell = \mathrm{LN}_\ell(p_{\ell-1}), \qquad x \leftarrow x + \mathrm{attn}(\mathrm{norm}_1(x) + p_\ell)

    :math:`p_0` is the parameter that the model adds to its tokens. Its forward reads zeros in its place, so that the
    tokens carry no positions, and each block adds what it needs. The LayerNorm of a block becomes the child
    `position_norm` of its first norm; the parameter keeps its name.

    It changes the outputs: apply it to a model that is not trained yet. In inference the positions depend on no input:
    `fold_norms` keeps them as constants, exactly, and their norms are gone. The norm before an attention, which must be
    torch's LayerNorm or RMSNorm, stays: `convert_norms` and the folds leave it alone.

    Args:
        model: a pre-norm model with positions ``[1, tokens, channels]``, such as timm's ViT, and repeated blocks.
        include: a regular expression, or several, searched for in the names of the first norms of the blocks. Default:
            all of them.
        exclude: the same, for norms to leave alone; it wins over `include`. Default: none.
        positions: dotted name of the parameter. Default: the only one with "pos" in its name that has the width of the
            norms.

    Returns:
        What was changed, and what was left and why.

    Raises:
        ValueError: a pattern is invalid or matches no norm.
        StabNormError: there are no blocks with norms, there is no such parameter or more than one, none can be changed,
            or the model is compiled, scripted or wrapped.

    Source: arXiv:2212.05262, LaPE.
    """
    check_remedied(model)
    blocks = blocks_of(model)
    norms: dict[str, NormLayer] = {}
    of_blocks: set[str] = set()
    for layer in find_norms(model):
        block = block_around(layer.name, blocks)
        if block is not None and block.name not in of_blocks:
            of_blocks.add(block.name)
            norms[layer.name] = layer
    names = chosen("norms in repeated blocks", norms, include, exclude)
    width = norms[names[0]].num_features
    path = _positions(model, width) if positions is None else positions
    holder_name, _, attribute = path.rpartition(".")
    try:
        holder = model.get_submodule(holder_name)
    except AttributeError:
        holder = nn.Module()
    if holder._parameters.get(attribute) is None:
        raise StabNormError(f"the model has no parameter {path!r}")
    steps, left = [], {}
    before: list[nn.Module] = []
    for name in names:
        module = norms[name].module
        if isinstance(module, MixedIn) or isinstance(holder, HiddenPositions):
            left[name] = "a remedy has changed it already"
        elif not isinstance(module, nn.LayerNorm | nn.RMSNorm) or isinstance(module, EvalAffineNorm):
            left[name] = f"{type(module).__name__} is not torch's LayerNorm or RMSNorm"
        elif norms[name].num_features != width or norms[name].channel_dim != -1:
            left[name] = f"it has not the {width} channels of the positions on its last axis"
        else:
            add = partial(_add, module, tuple(before), holder, attribute, width)
            steps.append(Step(name, f"adds {path}, normalised", add, (module,)))
            before.append(module)
    if steps:
        steps.append(Step(path, "read as zeros by the forward", partial(_hide, holder, attribute), (holder,)))
    return carried_out("lape", model, steps, left, "no")


def _positions(model: nn.Module, width: int) -> str:
    named = [
        name
        for name, parameter in model.named_parameters()
        if "pos" in name.rpartition(".")[2] and parameter.ndim > 1 and parameter.shape[-1] == width
    ]
    if len(named) != 1:
        seen = f"there are {', '.join(named)}" if named else 'none has "pos" in its name'
        raise StabNormError(f"the positions of width {width} are not clear: {seen}. Name the parameter with positions=")
    return named[0]


def _add(module: nn.Module, before: tuple[nn.Module, ...], holder: nn.Module, attribute: str, width: int) -> None:
    norm = new_norm("layer", width, module)
    mix_in(AddsPositions, module)
    module.position_norm = norm
    module.position_source, module.position_before = (holder, attribute), before  # type: ignore[assignment]


def _hide(holder: nn.Module, attribute: str) -> None:
    mix_in(HiddenPositions, holder, (attribute,))
