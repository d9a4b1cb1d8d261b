"""Which repeated block of a model a module is in, and how deep that block lies."""

from typing import NamedTuple

from torch import nn


class Block(NamedTuple):
    """One of the blocks that a model repeats.

    Attributes:
        name: its dotted name.
        stack: the dotted name of the outermost list that it is in; blocks of one stack share a residual stream.
        depth: its number in the stack, from 1.
    """

    name: str
    stack: str
    depth: int


def blocks_of(model: nn.Module) -> list[Block]:
    """Return the innermost repeated blocks, in module order: children of one class in a list that have parts.

    >>> layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
    >>> [(block.name, block.depth) for block in blocks_of(nn.ModuleDict({"layers": layers}))]
    [('layers.0', 1), ('layers.1', 2)]
    """
    names: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            children = [(f"{path}.{key}" if path else key, child) for key, child in module.named_children()]
            classes = [type(child) for _, child in children]
            names |= {
                name: child
                for name, child in children
                if classes.count(type(child)) > 1 and any(True for _ in child.children())
            }
    innermost = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    depths: dict[str, int] = {}
    blocks = []
    for name in innermost:
        outermost = min((other for other in names if f"{name}.".startswith(f"{other}.")), key=len)
        stack = outermost.rpartition(".")[0]
        depths[stack] = depths.get(stack, 0) + 1
        blocks.append(Block(name, stack, depths[stack]))
    return blocks


def block_around(name: str, blocks: list[Block]) -> Block | None:
    """Return the block that a module of this name lies in; None where it is in none."""
    return next((block for block in blocks if name.startswith(f"{block.name}.")), None)
