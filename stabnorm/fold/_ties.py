"""Which parameters a model of Hugging Face ties, because it ties them again whenever it is saved or loaded."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

Ties = dict[str, str]  # a parameter's name, and the name of the one that it is tied to


def drop_ties(model: nn.Module, names: Collection[str]) -> None:
    """Let a model forget that these parameters are tied; every other tie stays, and so does the configuration.

    The configuration's `tie_word_embeddings` belongs to all ties at once, and T5's forward reads it, too. Call this
    last: an error afterwards would not put the configuration back, which is no part of the model.
    """
    if not names:
        return
    knows = False
    for prefix, module in model.named_modules():
        own = {name.removeprefix(f"{prefix}.") for name in names if not prefix or name.startswith(f"{prefix}.")}
        declared = [each for each in _DECLARATIONS if isinstance(getattr(module, each, None), dict)]
        for attribute in declared:
            setattr(module, attribute, _without(_expanded(module, getattr(module, attribute)), own))
        if own and not declared and callable(getattr(module, "tie_weights", None)):
            vars(module)["tie_weights"] = KeepsApart(module, own)
        knows |= bool(declared) or "tie_weights" in vars(module)
    config = getattr(model, "config", None)
    if not knows and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]


_DECLARATIONS = ("all_tied_weights_keys", "_tied_weights_keys")  # dicts from transformers 5 on


class KeepsApart:
    """`tie_weights` of a model from before transformers 5, which ties what its code says: all but these parameters.

    Args:
        model: the model whose method it takes the place of.
        names: parameters that stay on their own.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.model, self.names = model, sorted(names)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Tie the others."""
        own = [(self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in self.names]
        parameters = [owner._parameters[attribute] for owner, attribute in own]
        type(self.model).tie_weights(self.model, *args, **kwargs)  # type: ignore[attr-defined]
        for (owner, attribute), parameter in zip(own, parameters, strict=True):
            owner._parameters[attribute] = parameter


def _expanded(module: nn.Module, ties: Ties) -> Ties:
    """Give the ties by parameters' names, where they are declared by patterns or modules."""
    expand = getattr(module, "get_expanded_tied_weights_keys", None)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if expand is None or parameters.issuperset(ties):
        return ties
    expanded: Ties = expand(all_submodels=False)
    return expanded or ties  # none where the configuration switches them off


def _without(ties: Mapping[str, str], names: Collection[str]) -> Ties:
    """Drop names; those that were tied to a dropped one stay tied to each other."""
    left: Ties = {}
    heirs: Ties = {}
    for name, source in ties.items():
        if name in names:
            continue
        if source not in names:
            left[name] = source
        elif source in heirs:
            left[name] = heirs[source]
        else:
            heirs[source] = name
    return left
