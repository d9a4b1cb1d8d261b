"""`unmix_norms`: batch norms that a shifted stream, whose neighbours resemble each other, does not mislead."""

from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stabnorm._checks import check_count, check_number
from stabnorm._models.names import Patterns
from stabnorm.nn.mixed_in import mix_in, mixins_of
from stabnorm.nn.unmix import Unmixing, UnMixTNS
from stabnorm.remedies.report import RemedyReport, Step, carried_out, check_remedied, chosen


def unmix_norms(
    model: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    components: int = 16,
    temperature: float = 0.07,
    momentum: float | None = None,
    seed: int = 0,
) -> RemedyReport:
    """Make every batch norm of a trained model an `UnMixTNS`, in place: for test data that is shifted and correlated.

    In a stream whose neighbours resemble each other, as the frames of a video do, the statistics of a batch are those
    of one class, and the running statistics are those of other data. An `UnMixTNS` normalises each image with
    statistics to which it contributes itself, and which follow the stream. See `stabnorm.nn.UnMixTNS` for the formula.

    Parameters keep their names, and checkpoints from before load as well: the components then begin around the loaded
    running statistics. What each norm computes depends on the image, so it does not fold; `undo` takes it off again.

    Args:
        model: a trained model.
        include: a regular expression, or several, searched for in the names of the batch norms. Default: all.
        exclude: the same, for norms to leave alone; it wins over `include`. Default: none.
        components: K, the number of pairs of mean and variance. Default: 16, as in the paper.
        temperature: of the softmax over the components. Default: 0.07, as in the paper.
        momentum: weight of a batch of 64 images in the components; at 0 they do not follow the stream. Default: that of
            the batch norm, or 0.1 where it has none.
        seed: of the noise in the first means. Default: 0.

    Returns:
        What was changed, and what was left and why.

    Raises:
        TypeError: an argument has another type.
        ValueError: a pattern is invalid or matches no batch norm, or an argument is out of range.
        StabNormError: no batch norm can be changed, or the model is compiled, scripted or wrapped.

    Source: arXiv:2401.08328, Un-Mixing Test-Time Normalization Statistics.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> print(unmix_norms(model))
    unmix_norms: 1 changed; outputs are changed
      1  16 components around its running statistics
    """
    check_remedied(model)
    check_count("components", components)
    check_number("temperature", temperature, above=0)
    if momentum is not None:
        check_number("momentum", momentum, least=0, most=1, hint=", or None for the batch norm's own")
    check_count("seed", seed, 0)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    steps, left = [], {}
    for index, name in enumerate(chosen("batch norms", norms, include, exclude)):
        norm: Any = norms[name]
        if (reason := _obstacle(norm)) is not None:
            left[name] = reason
            continue
        own = 0.1 if norm.momentum is None else norm.momentum
        unmixing = Unmixing(components, float(temperature), own if momentum is None else momentum, seed + index)
        action = f"{components} components around its running statistics"
        steps.append(Step(name, action, partial(_unmix, norm, unmixing), (norm,)))
    return carried_out("unmix_norms", model, steps, left, "no")


def _obstacle(norm: Any) -> str | None:
    if UnMixTNS in mixins_of(norm):
        return "it is unmixed already"
    if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return f"the forward of {type(norm).__name__} is not that of torch's batch norms"
    if norm.running_mean is None:
        return "it keeps no running statistics, so the components would have no beginning"
    return None


def _unmix(norm: nn.Module, unmixing: Unmixing) -> None:
    mix_in(UnMixTNS, norm)
    assert isinstance(norm, UnMixTNS)
    norm.add_components(unmixing)
