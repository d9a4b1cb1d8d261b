"""Read parameters right before and right after an optimizer changes them, in any training loop.

Torch calls global hooks around the step of every optimizer that derives from `torch.optim.Optimizer`; there the
gradients are final (merged over ranks, unscaled, clipped) and every parameter's own learning rate is known.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

Group = dict[str, Any]  # of an optimizer: its parameters and their options
Looks = Callable[[list[int], torch.optim.Optimizer, Group], None]
"""Called with the parameters that a group of an optimizer holds, as indices, with the optimizer and the group."""


class OptimizerSteps:
    """Calls `before` and `after` for each group of each optimizer that holds some of these parameters.

    Before a step there may be no gradients yet, because a closure, such as Lightning's, runs inside the step.

    Attributes:
        seen: the parameters, as indices, on which a step was seen so far; their values may be NaN all the same.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], before: Looks | None, after: Looks) -> None:
        self._index = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._looks = ((before, register_optimizer_step_pre_hook), (after, register_optimizer_step_post_hook))
        self._handles: list[RemovableHandle] = []
        self.seen: set[int] = set()

    def attach(self) -> None:
        """Register the hooks."""
        for look, register in self._looks:
            if look is not None:
                self._handles.append(register(self._hook(look)))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, look: Looks) -> Callable[[torch.optim.Optimizer, tuple[Any, ...], dict[str, Any]], None]:
        def hook(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                return
            with torch.no_grad():
                for rows, group in self._groups(optimizer):
                    look(rows, optimizer, group)

        return hook

    def _groups(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[list[int], Group]]:
        for group in optimizer.param_groups:
            rows = [self._index[id(p)] for p in group["params"] if id(p) in self._index]
            if rows:
                self.seen.update(rows)
                yield rows, group


def option_of(group: Group, name: str) -> float | Tensor:
    """Return an option of a group, such as "lr"; NaN if it has none of this name, or keeps something else there."""
    value = group.get(name)
    return value if isinstance(value, int | float | Tensor) else torch.nan


class Indices:
    """Index tensors of lists of rows. Each one is made once, because this copies it to the device."""

    def __init__(self) -> None:
        self._made: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def on(self, device: torch.device, rows: Sequence[int]) -> Tensor:
        """Return the rows as an index tensor."""
        key = (device, tuple(rows))
        if key not in self._made:
            self._made[key] = torch.tensor(rows, device=device)
        return self._made[key]


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor: the shard of a sharded tensor, else the whole."""
    own = tensor.detach()
    shard: Tensor = own.to_local() if hasattr(own, "to_local") else own
    return shard


def no_step(names: Sequence[str], parameters: Sequence[nn.Parameter], steps: OptimizerSteps) -> str | None:
    """Return a warning about trained parameters on which no optimizer step was seen, if there are any.

    Args:
        names: of the first parameters.
        parameters: those of `steps`.
        steps: what was seen.
    """
    rows = zip(names, parameters, strict=False)
    names = [name for row, (name, p) in enumerate(rows) if p.requires_grad and row not in steps.seen]
    if not names:
        return None
    others = " and others" if len(names) > 8 else ""
    return (
        f"no optimizer step was seen on {', '.join(names[:8])}{others}. Only optimizers that derive from "
        "torch.optim.Optimizer are seen, and not when their step is compiled or left out by a loss scaler"
    )
