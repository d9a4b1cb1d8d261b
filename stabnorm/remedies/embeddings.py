"""`stable_embedding`: an embedding that begins with a small even scale and is normalised."""

from functools import partial

from torch import nn

from stabnorm._checks import check_flag
from stabnorm._models.names import Patterns
from stabnorm.nn.added_norm import NormedOutput
from stabnorm.nn.mixed_in import mixins_of
from stabnorm.remedies.output_norms import add_output_norm
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen


def stable_embedding(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None, *, init: bool = True
) -> RemedyReport:
    r"""Put a LayerNorm behind each embedding and draw its weight by Xavier's rule, in place.

    .. math:: y = \mathrm{LayerNorm}(E_i), \qquad E \sim U(-a, a), \quad a = \sqrt{6 / (V + d)}

    What follows then sees the same scale for every token, whatever the gradients of rare tokens have done to their
    rows. The norm becomes the child `output_norm` of the embedding, whose weight keeps its name. An output layer that
    shares the weight reads it as before, without the norm.

    It changes the outputs: apply it to a model that is not trained yet. The authors also keep the optimizer's state of
    the embedding in 32 bits. `convert_norms` switches the norm as any other, and `fold_norms` then folds it forward.

    Args:
        model: any module with `nn.Embedding`.
        include: a regular expression, or several, searched for in an embedding's name. Default: all embeddings.
        exclude: the same, for embeddings to leave alone; it wins over `include`. Default: none.
        init: whether to draw the weights. Default: True.

    Returns:
        What was changed, and what was left and why.

    Raises:
        ValueError: a pattern is invalid or matches no embedding.
        StabNormError: there is no embedding to change, or the model is compiled, scripted or wrapped.

    Source: arXiv:2110.02861, 8-bit Optimizers via Block-wise Quantization.

    >>> import torch
    >>> model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10))
    >>> stable_embedding(model).changed
    ['0']
    >>> y = model[0](torch.arange(10))
    >>> bool((y.square().mean(-1) - 1).abs().max() < 0.01)
    True
    """
    check_flag("init", init)
    check_remedied(model)
    embeddings = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    steps, left = [], {}
    for name in chosen("embeddings", embeddings, include, exclude):
        embedding = embeddings[name]
        if NormedOutput in mixins_of(embedding):
            left[name] = "its output is normalised already"
            continue
        action = "output normalised (layer)" + ", weight drawn by Xavier's rule" * init
        numbers = (embedding.weight,) if init else ()
        steps.append(Step(name, action, partial(_stabilise, embedding, init), (embedding,), numbers))
    return carried_out("stable_embedding", model, steps, left, "no")


def _stabilise(embedding: nn.Embedding, init: bool) -> None:
    if init:
        nn.init.xavier_uniform_(embedding.weight)
        if embedding.padding_idx is not None:
            embedding.weight[embedding.padding_idx].zero_()
    add_output_norm(embedding, "layer", embedding.embedding_dim)
