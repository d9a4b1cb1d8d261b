"""What a family is, the inputs they share, and the draw of everything that starts at 0 or 1."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stabnorm import find_norms

VOCABULARY = 13


class Example(NamedTuple):
    """One input of a model."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Args:
        name: For test ids.
        factory: Builds one; draws from torch's default generator.
        inputs: An example from a generator and a size, 0 or 1: another batch, and another length where it may vary.
        norms: How many layer and rms norms it has.
    """

    name: str
    factory: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator, int], Example]
    norms: int

    def build(self, seed: int = 0) -> nn.Module:
        """The same model for the same seed; the random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.factory()

    def example(self, seed: int = 0) -> Example:
        """The same input for the same seed; odd seeds have another size."""
        return self.inputs(torch.Generator().manual_seed(seed), seed % 2)

    def __str__(self) -> str:
        return self.name


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw new values of every parameter and running statistic in place, so that none is 0, 1 or negligible.

    Gains, layer scales and variances are away from 0 and of order 1; matrices suit a fan-in of about ten.
    """
    generator = torch.Generator().manual_seed(seed)
    plus_one = {id(layer.gain_parameter) for layer in find_norms(model) if layer.gain_offset}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=generator)
            elif "bias" in name:
                parameter.normal_(std=0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
                parameter.sub_(1.0 if id(parameter) in plus_one else 0.0)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith(("running_var", "running_square")):
                buffer.uniform_(0.3, 2.0, generator=generator)
    return model


def images(height: int, width: int) -> Callable[[torch.Generator, int], Example]:
    def draw(generator: torch.Generator, size: int) -> Example:
        return Example((torch.randn(2 + size, 3, height, width, generator=generator),), {})

    return draw


def token_ids(generator: torch.Generator, size: int) -> Example:
    return Example((torch.randint(VOCABULARY, (2 + size, 7 - 2 * size), generator=generator),), {})


def source_and_target(generator: torch.Generator, size: int) -> Example:
    (target,), _ = token_ids(generator, size)
    return Example((torch.randint(VOCABULARY, (2 + size, 5 + size), generator=generator), target), {})


def padding(batch: int, length: int) -> Tensor:
    """[batch, length] bool, True = padding: each sequence is one or two shorter than the one before it."""
    lengths = length - torch.arange(batch) * (1 + length % 2)
    return torch.arange(length) >= lengths[:, None]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, C] -> [B, heads, L, C / heads]."""
    y: Tensor = x.unflatten(-1, (heads, -1))
    return y.transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, L, D] -> [B, L, heads D]."""
    return x.transpose(1, 2).flatten(2)


def tensor(output: Any) -> Tensor:
    """What a module returned, as the tensor it is."""
    assert isinstance(output, Tensor)
    return output
