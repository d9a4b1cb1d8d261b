"""What the tests of folding share: models of one expression, drawn statistics, and an error by a count of its own."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm import find_norms
from stabnorm.nn import RepBN
from tests.families import randomize_


class Net(nn.Module):
    """A model whose forward is a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter | None) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def net(function: Callable[..., Any], **parts: nn.Module | nn.Parameter | None) -> Callable[[], nn.Module]:
    """What builds such a model, a fresh one at each call."""
    model = Net(function, **parts)
    return lambda: copy.deepcopy(model)


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval and float64, with every parameter and statistic drawn."""
    return randomize_(model, seed).double().eval()


def swapped(model: nn.Module, center: bool = True) -> nn.Module:
    """The model with a RepBN for each of its norms."""
    for layer in find_norms(model):
        norm = RepBN(layer.num_features, center=center, channel_dim=layer.channel_dim)
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if child is layer.module:
                    module._modules[name] = norm
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(actual: Any, expected: Any) -> float:
    """Of tensors, or of tuples of tensors: the largest, each relative to its largest element."""
    if isinstance(expected, dict):
        expected, actual = list(expected.values()), list(actual.values())
    if isinstance(expected, Tensor):
        error: Tensor = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
        return float(error)
    return max(relative_error(one, other) for one, other in zip(actual, expected, strict=True))


@torch.no_grad()
def error_of(folded: nn.Module, model: nn.Module, inputs: Sequence[tuple[Any, ...]]) -> float:
    """The folded model's error on several inputs; without torch's fused encoder layers, which skip unfolded norms."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return max(relative_error(folded(*x), model(*x)) for x in inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
