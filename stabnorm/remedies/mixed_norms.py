"""`mix_norm`: post-norm in the first blocks and pre-norm in the others (Mix-LN). Experimental."""

from functools import partial

from torch import nn

from stabnorm._checks import check_number
from stabnorm._models.names import Patterns
from stabnorm.remedies._blocks import Block, blocks_of
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen

_FLAGS = ("norm_first", "do_layer_norm_before", "normalize_before")  # of torch, of OPT and BioGPT, of fairseq


def mix_norm(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None, *, share: float = 0.25
) -> RemedyReport:
    r"""Let the first blocks normalise behind the sum (post-norm), and leave pre-norm in the others, in place.

    .. math:: x_{\ell+1} = \mathrm{norm}(x_\ell + F_\ell(x_\ell)) \quad \text{for } \ell \le \alpha L

    Experimental: the authors report gains, and those of LayerNorm Scaling (arXiv:2502.05795) saw it diverge at 350M and
    1B parameters. In our own study (docs/remedies.md) both the growth and the loss became worse. Watch such a run.

    It changes the outputs: apply it to a model that is not trained yet. A block must have the flag that says where it
    normalises: `norm_first` (torch), `do_layer_norm_before` (Hugging Face) or `normalize_before` (fairseq). No
    parameter changes, and no checkpoint holds the flag, so apply it again before a checkpoint is loaded. A post-norm is
    read by the residual stream as well: `fold_norms` folds it only along the whole stream, and not in a mixed model.

    Args:
        model: a model that repeats pre-norm blocks with such a flag in an `nn.ModuleList` or `nn.Sequential`.
        include: a regular expression, or several, searched for in the names of the blocks that become post-norm.
            Default: the first `share` of each stack.
        exclude: the same, for blocks to leave alone; it wins over `include`. Default: none.
        share: which share of the blocks of each stack, rounded down, alpha. Default: 0.25.

    Returns:
        What was changed, and what was left and why.

    Raises:
        ValueError: a pattern is invalid or matches no block, or `share` is not between 0 and 1.
        StabNormError: no block has such a flag, none can be changed, or the model is compiled, scripted or wrapped.

    Source: arXiv:2412.13795, Mix-LN.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    >>> mix_norm(model).changed
    ['layers.0']
    """
    check_number("share", share, least=0.0, most=1.0)
    check_remedied(model)
    blocks = {block.name: block for block in blocks_of(model)}
    flags = {name: flag for name in blocks if (flag := _flag_of(model.get_submodule(name)))}
    hint = f"It needs repeated blocks with one of the flags {', '.join(_FLAGS)}"
    names = chosen("blocks that say where they normalise", flags, include, exclude, hint=hint)
    steps, left = [], {}
    for name in names:
        block = model.get_submodule(name)
        if not getattr(block, flags[name]):
            left[name] = "it is post-norm already"
        elif include is None and blocks[name].depth > share * _length(blocks[name].stack, blocks):
            left[name] = f"it is behind the first {share:g} of the blocks"
        else:
            steps.append(Step(name, "post-norm", partial(setattr, block, flags[name], False), (block,)))
    return carried_out("mix_norm", model, steps, left, "no")


def _flag_of(block: nn.Module) -> str | None:
    return next((flag for flag in _FLAGS if isinstance(getattr(block, flag, None), bool)), None)


def _length(stack: str, blocks: dict[str, Block]) -> int:
    return sum(block.stack == stack for block in blocks.values())
