"""`train_only_norms` and `freeze_embedding`: train a part of the model only."""

from functools import partial

from torch import nn

from stabnorm._models.names import Patterns
from stabnorm.norms import find_norms
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen


def train_only_norms(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> RemedyReport:
    """Train gains and biases of the norms, and freeze everything else.

    It shows how much the norms alone can do, or takes part in fine-tuning. From scratch it is no way to train: in our
    study (docs/remedies.md) a small convolutional net had learned almost nothing after 200 steps.

    Args:
        model: any module.
        include: a regular expression, or several, searched for in a norm's name. Default: all norms.
        exclude: the same, for norms to freeze as well; it wins over `include`. Default: none.

    Returns:
        Which parameters were frozen, and which are trained. The outputs are the same bits.

    Raises:
        ValueError: a pattern is invalid or matches no norm.
        StabNormError: no norm has a gain or a bias, or the model is wrapped or compiled.

    Source: arXiv:2003.00152, Training BatchNorm and only BatchNorm.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> report = train_only_norms(model)
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['1.weight', '1.bias']
    """
    check_remedied(model)
    norms = {layer.name: layer.module for layer in find_norms(model) if any(True for _ in layer.module.parameters())}
    names = chosen("norms with a gain or a bias", norms, include, exclude)
    kept = {id(p) for name in names for p in norms[name].parameters()}
    steps = [_set_trained(name, p, id(p) in kept) for name, p in model.named_parameters()]
    return carried_out("train_only_norms", model, [step for step in steps if step is not None], {}, "bits")


def freeze_embedding(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> RemedyReport:
    """Take the embeddings out of the training, as fine-tuning with SGD needs.

    An output layer that shares its weight with the embedding is frozen with it. It is for fine-tuning: in our study,
    which trains from scratch, it took the symptom away and cost 0.3 nats (docs/remedies.md).

    Args:
        model: any module with `nn.Embedding` or `nn.EmbeddingBag`.
        include: a regular expression, or several, searched for in an embedding's name. Default: all embeddings.
        exclude: the same, for embeddings to leave alone; it wins over `include`. Default: none.

    Returns:
        Which parameters were frozen. The outputs are the same bits.

    Raises:
        ValueError: a pattern is invalid or matches no embedding.
        StabNormError: there is no embedding that is trained, or the model is wrapped or compiled.

    Source: arXiv:2211.09359, How to Fine-Tune Vision Models with SGD.

    >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    >>> freeze_embedding(model).changed
    ['0.weight']
    """
    check_remedied(model)
    found = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    names = chosen("embeddings", found, include, exclude)
    parameters = {id(p): p for name in names for p in model.get_submodule(name).parameters()}
    steps = [_set_trained(name, p, False) for name, p in model.named_parameters() if id(p) in parameters]
    left = {} if any(steps) else dict.fromkeys(names, "it is frozen already")
    return carried_out("freeze_embedding", model, [step for step in steps if step is not None], left, "bits")


def _set_trained(name: str, parameter: nn.Parameter, trained: bool) -> Step | None:
    """Plan to train or to freeze a parameter; None where nothing has to be done."""
    if parameter.requires_grad == trained:
        return None
    return Step(name, "trained" if trained else "frozen", partial(parameter.requires_grad_, trained))
