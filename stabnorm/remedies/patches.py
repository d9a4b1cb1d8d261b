"""`dual_patch_norm`: normalise patches before and after they are embedded."""

from functools import partial

from torch import nn

from stabnorm._models.names import Patterns
from stabnorm.nn.added_norm import new_norm
from stabnorm.nn.mixed_in import MixedIn, mix_in
from stabnorm.nn.patch_norm import NormedPatches
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen


def dual_patch_norm(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> RemedyReport:
    r"""Put a LayerNorm before and one after the patch embedding of a vision transformer, in place.

    .. math:: x = \mathrm{LN}_2(W\,\mathrm{LN}_1(p) + b)

    The gradient of the patch embedding no longer depends on the contrast of an image, and its output has the scale that
    the positions expect. The norms become the children `patch_norm` and `output_norm` of the convolution, whose weight
    keeps its name and shape.

    It changes the outputs: apply it to a model that is not trained yet. `convert_norms` switches the norms, and
    `fold_norms` then folds the first forward and the second backward into the convolution.

    Args:
        model: a model that embeds patches with an `nn.Conv2d` whose stride is its kernel, without padding.
        include: a regular expression, or several, searched for in the names of such convolutions. Default: the first of
            the model.
        exclude: the same, for convolutions to leave alone; it wins over `include`. Default: none.

    Returns:
        What was changed, and what was left and why.

    Raises:
        ValueError: a pattern is invalid or matches no such convolution.
        StabNormError: there is no such convolution, or the model is compiled, scripted or wrapped.

    Source: arXiv:2302.01327, Dual PatchNorm.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2))
    >>> print(dual_patch_norm(model))
    dual_patch_norm: 1 changed; outputs are changed
      0  48 numbers of a patch and 8 channels of its embedding normalised
    >>> model(torch.randn(2, 3, 16, 16)).shape
    torch.Size([2, 8, 16])
    """
    check_remedied(model)
    cutting = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and _cuts_patches(m)}
    hint = "They are nn.Conv2d with a stride that is the kernel, above 1, and without padding, dilation and groups"
    names = chosen("patch embeddings", cutting, include, exclude, hint=hint)
    steps, left = [], {}
    for number, name in enumerate(names):
        conv = cutting[name]
        if isinstance(conv, MixedIn):
            left[name] = "it has a norm of a remedy already"
        elif include is None and number > 0:
            left[name] = "it is not the first one"
        else:
            size = conv.weight[0].numel()
            action = f"{size} numbers of a patch and {conv.out_channels} channels of its embedding normalised"
            steps.append(Step(name, action, partial(_normalise, conv, size), (conv,)))
    return carried_out("dual_patch_norm", model, steps, left, "no")


def _cuts_patches(conv: nn.Conv2d) -> bool:
    plain = conv.padding in ((0, 0), "valid") and conv.dilation == (1, 1) and conv.groups == 1
    return plain and conv.stride == conv.kernel_size and max(conv.kernel_size) > 1


def _normalise(conv: nn.Conv2d, size: int) -> None:
    first, second = new_norm("layer", size, conv), new_norm("layer", conv.out_channels, conv)
    mix_in(NormedPatches, conv)
    conv.patch_norm, conv.output_norm = first, second
