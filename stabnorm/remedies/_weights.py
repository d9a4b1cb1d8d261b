"""The weights of a model that can become a function of their parameter, and why others cannot."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stabnorm._models.tree import Tree

_THREE_IN_ONE = ("qkv", "c_attn", "Wqkv", "in_proj")  # queries, keys and values, one after the other


class Weight(NamedTuple):
    """The weight of a module.

    Attributes:
        name: dotted name of the module.
        module: the module.
        attribute: the parameter's name in it.
        transposed: whether the weight is ``[inputs, outputs]``.
    """

    name: str
    module: nn.Module
    attribute: str
    transposed: bool

    @property
    def parameter(self) -> Tensor:
        """The parameter itself, whatever the module computes from it."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    @property
    def parts(self) -> int:
        """How many matrices it holds, one after the other: 3 for queries, keys and values, else 1."""
        rows, columns = self.parameter.shape[:2] if not self.transposed else self.parameter.shape[::-1]
        fused = self.attribute == "in_proj_weight" or self.name.rpartition(".")[2] in _THREE_IN_ONE
        return 3 if fused and rows == 3 * columns else 1


def linear_weights(model: nn.Module) -> list[Weight]:
    """Return the weights of all linear layers: `nn.Linear`, Hugging Face's Conv1D, and `nn.MultiheadAttention`."""
    return [weight for name, module in model.named_modules() if (weight := weight_of(name, module)) is not None]


def convolution_weights(model: nn.Module) -> list[Weight]:
    """Return the weights of all convolutions; not of transposed ones, whose first axis is that of the inputs."""
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d
    return [
        Weight(name, module, "weight", False) for name, module in model.named_modules() if isinstance(module, kinds)
    ]


def weight_of(name: str, module: nn.Module) -> Weight | None:
    """Return the weight of a linear layer, or None for another module."""
    if isinstance(module, nn.Linear):
        return Weight(name, module, "weight", False)
    if isinstance(module, nn.MultiheadAttention):
        return Weight(name, module, "in_proj_weight", False)
    if is_conv1d(module):
        return Weight(name, module, "weight", True)
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's linear layer with the weight ``[inputs, outputs]``."""
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers") for cls in type(module).__mro__)


def changeable(
    model: nn.Module, weights: Sequence[Weight], own_obstacle: Callable[[Weight], str | None] = lambda _: None
) -> tuple[list[Weight], dict[str, str]]:
    """Return the weights that can become a function of their parameter, and by name why the others cannot.

    Args:
        model: the model that holds them.
        weights: the candidates.
        own_obstacle: what else stands in the way. Default: nothing.
    """
    tree = Tree(model)
    reasons = {weight.name: obstacle(weight, tree) or own_obstacle(weight) for weight in weights}
    left = {name: why for name, why in reasons.items() if why}
    return [weight for weight in weights if weight.name not in left], left


def obstacle(weight: Weight, tree: Tree) -> str | None:
    """Return the reason why a weight cannot become a function of its parameter; None where it can."""
    if weight.module._parameters.get(weight.attribute) is None and isinstance(weight.module, nn.MultiheadAttention):
        return "its queries and keys have weights of their own"
    return tensor_obstacle(weight.module, weight.attribute, tree)


def tensor_obstacle(module: nn.Module, attribute: str, tree: Tree) -> str | None:
    """Return the reason why a parameter of a module cannot be replaced by a function of it; None where it can."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized (torch.nn.utils.parametrize)"
    parameter = module._parameters.get(attribute)
    if parameter is None:
        return "its weight is computed already"
    if not parameter.is_floating_point():
        return f"its weight is of {parameter.dtype}, which is not trained"
    shared = tree.shared(module)
    if shared:
        return f"{shared}, and only one of the two would change"
    if not bool(torch.isfinite(parameter).all()):
        return "its weight has NaN or infinite numbers"
    return None
