"""`Verdict`: what is known of a step before the optimizer changes anything."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

NON_FINITE = "non_finite"


@dataclass(frozen=True)
class Verdict:
    """What is known of a step before the optimizer changes anything; the same on all ranks.

    Attributes:
        kind: "non_finite", or "" where nothing is wrong.
        layer: the first norm in depth order whose input is not finite; "" where all are finite, or nothing is wrong.
        reason: one sentence that says what is wrong.
        here: whether this process saw it. With several ranks it may be another one.
    """

    kind: str = ""
    layer: str = ""
    reason: str = ""
    here: bool = False

    @property
    def bad(self) -> bool:
        """Whether something is wrong."""
        return bool(self.kind)


def flags_of(loss: Tensor | float | None, gradients: Sequence[Tensor], layers: Tensor) -> Tensor:
    """Return whether loss, gradients and the input of each layer are not finite, ``[2 + layers]`` bool."""
    device = layers.device
    bad_loss = not math.isfinite(loss) if isinstance(loss, int | float) else False
    flags = [torch.tensor(bad_loss, device=device), torch.zeros((), dtype=torch.bool, device=device)]
    if isinstance(loss, Tensor):
        flags[0] = ~torch.isfinite(loss.detach()).all().to(device)
    if gradients:
        largest = torch._foreach_norm(list(gradients), math.inf)
        flags[1] = ~torch.isfinite(torch.stack([value.to(device, torch.float32) for value in largest])).all()
    return torch.cat([torch.stack(flags), layers])


def gradients_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return the gradients that these optimizers would apply, of sharded ones the part of this process."""
    gradients = [p.grad for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    return [g.to_local() if hasattr(g, "to_local") else g for g in dense if g.numel()]


def verdict_of(flags: Sequence[bool], layers: Sequence[str], *, here: bool) -> Verdict:
    """Return the verdict on the flags of all ranks together, see `flags_of`.

    >>> verdict_of([False, True, False, True], ["norm1", "norm2"], here=True).reason
    "the input of the norm 'norm2' is not finite, nor are gradients. It is the first one in depth order"
    """
    loss, gradients, *of_layers = flags
    first = next((name for name, bad in zip(layers, of_layers, strict=True) if bad), None)
    beside = [what for what, bad in (("the loss", loss), ("gradients", gradients)) if bad]
    if first is None and not beside:
        return Verdict()
    if first is None:
        verb = "are" if gradients else "is"
        return Verdict(NON_FINITE, "", f"{' and '.join(beside)} {verb} not finite, and the input of each norm is", here)
    others = f", nor {'are' if gradients else 'is'} {' and '.join(beside)}" if beside else ""
    name = f"the norm {first!r}" if first else "the norm"
    reason = f"the input of {name} is not finite{others}. It is the first one in depth order"
    return Verdict(NON_FINITE, first, reason, here)
