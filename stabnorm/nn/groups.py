"""Parameter groups for an optimizer."""

from typing import Any

from torch import Tensor, nn

from stabnorm._checks import check_number
from stabnorm.norms import find_norms


def no_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups for `torch.optim.AdamW`: matrices with weight decay, and norms, biases and `eta` without.

    Weight decay on a norm's parameters changes what it computes (eta and gamma drift to 0) and regularises nothing.
    Frozen parameters are left out; a shared one is listed once.

    Args:
        model: the model; in a LightningModule's `configure_optimizers`, `self`.
        weight_decay: weight decay of the first group.

    Returns:
        ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]``; an empty group is
        left out.

    >>> from stabnorm.nn import RepBN
    >>> groups = no_decay_groups(nn.Sequential(nn.Linear(4, 8), RepBN(8)), 0.05)
    >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
    [(1, 0.05), (4, 0.0)]
    """
    check_number("weight_decay", weight_decay, least=0)
    of_norms = {id(parameter) for norm in find_norms(model) for parameter in norm.module.parameters()}
    with_decay: list[Tensor] = []
    without: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or id(parameter) in of_norms
            (without if plain else with_decay).append(parameter)
    groups = [(with_decay, weight_decay), (without, 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]
