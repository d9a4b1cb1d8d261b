"""Which parameters a model of Hugging Face ties, because it ties them again whenever it is saved or loaded."""

from collections.abc import Collection, Mapping

from torch import nn

Ties = dict[str, str]  # a parameter's name, and the name of the one that it is tied to


def drop_ties(model: nn.Module, names: Collection[str]) -> None:
    """Let a model forget that these parameters are tied; every other tie stays, and so does the configuration.

    The configuration's `tie_word_embeddings` belongs to all ties at once, and T5's forward reads it, too.
    """
    if not names:
        return
    declares = False
    for prefix, module in model.named_modules():
        own = {name.removeprefix(f"{prefix}.") for name in names if not prefix or name.startswith(f"{prefix}.")}
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            ties = getattr(module, attribute, None)
            if isinstance(ties, dict):
                declares = True
                setattr(module, attribute, _without(_expanded(module, ties), own))
    config = getattr(model, "config", None)
    if not declares and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]  # transformers before 5 knows only this


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
