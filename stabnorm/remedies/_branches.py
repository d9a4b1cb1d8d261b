"""The layers that write to the residual stream of a pre-norm model, as a forward shows them."""

from typing import Any, NamedTuple

import torch
from torch import nn

from stabnorm._models.copies import copied
from stabnorm._models.devices import device_of
from stabnorm._models.examples import read_examples
from stabnorm._models.random_state import random_state_kept
from stabnorm.errors import StabNormError
from stabnorm.fold._writers import find_streams
from stabnorm.nn.mixed_in import materialize
from stabnorm.norms import find_norms


class Branch(NamedTuple):
    """The last layer of a residual branch.

    Attributes:
        name: dotted name of the layer.
        module: the layer, a linear or convolution layer.
    """

    name: str
    module: nn.Module


def residual_branches(model: nn.Module, example: Any) -> list[Branch]:
    """Run a copy of the model and return the layers whose output is added to what a norm has read already.

    Raises:
        ValueError: the example does not run.
        StabNormError: no norm reads a sum to which a branch was added.
    """
    examples = read_examples("example", example)
    with random_state_kept(device_of(model)), torch.inference_mode(False):
        copy = copied(model).eval()
        for module in reversed(list(copy.modules())):
            materialize(module)  # a computed weight is no parameter, and a forward is followed by its parameters
        norms = [layer.name for layer in find_norms(copy) if layer.channel_dim == -1 and layer.feature_dims == 1]
        try:
            streams = find_streams(copy, norms, examples, None)
        except Exception as error:
            raise ValueError(f"the model does not run on the example: {type(error).__name__}: {error}") from error
    first: set[int] = set()
    names: dict[str, None] = {}
    read_before: list[frozenset[int]] = []
    for _, writers in streams.reads:
        older = [seen for seen in read_before if seen < writers]
        if not older:
            first |= writers
        else:
            names |= {streams.writers[i].name: None for i in sorted(writers - max(older, key=len))}
        read_before.append(writers)
    trunk = {streams.writers[i].name for i in first}
    branches = []
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if name not in trunk and attribute == "weight" and not isinstance(module, nn.Embedding):
            branches.append(Branch(owner, module))
    if not branches:
        problems = "; ".join(f"{name}: {why}" for name, why in list(streams.problems.items())[:3])
        raise StabNormError(
            "no residual branch was found: a norm must read the sum of the layers before it, as in a pre-norm "
            f"transformer{f'. {problems}' if problems else ''}"
        )
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return sorted(branches, key=lambda branch: order[branch.name])
