"""`Verdict`: what is known of a step before the optimizer changes anything."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

NON_FINITE, SPIKE = "non_finite", "spike"


@dataclass(frozen=True)
class Verdict:
    """What is known of a step before the optimizer changes anything; the same on all ranks.

    Attributes:
        kind: "non_finite", "spike", or "" where nothing is wrong.
        layer: the first norm in depth order whose input is not finite, or far above its past; "" where there is none.
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


class Seen(NamedTuple):
    """What is looked at before a step, of one process or of all.

    Attributes:
        flags: whether loss, gradients and the input of each norm are not finite, ``[2 + layers]`` of 0 and 1.
        sizes: loss, norm of the gradient and largest input of each norm, ``[2 + layers]``; 0 where it is not known.
    """

    flags: Tensor
    sizes: Tensor

    @classmethod
    def of(
        cls,
        loss: Tensor | float | None,
        gradients: Sequence[Tensor],
        gradient_norm: Tensor | float | None,
        largest: Tensor,
    ) -> "Seen":
        """Look at a step, without reading from the device.

        Args:
            loss: the loss.
            gradients: the gradients that must be finite.
            gradient_norm: the norm of all gradients.
            largest: ``[layers]``, the largest input of each norm; not finite where an element is not.
        """
        device = largest.device
        numbers = [torch.zeros((), device=device) for _ in range(2)]
        for place, value in enumerate((loss, gradient_norm)):
            if value is not None:
                number = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
                numbers[place] = number.to(device).reshape(())
        bad = [~torch.isfinite(numbers[0]), torch.zeros((), dtype=torch.bool, device=device)]
        if gradients:
            highest = torch._foreach_norm(list(gradients), math.inf)
            bad[1] = ~torch.isfinite(torch.stack([value.to(device, torch.float32) for value in highest])).all()
        flags = torch.cat([torch.stack(bad), ~torch.isfinite(largest)])
        sizes = torch.cat([torch.stack(numbers), largest.float()])
        return cls(flags.float(), torch.where(torch.isfinite(sizes), sizes, 0))


def gradients_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return the gradients that these optimizers would apply, of sharded ones the part of this process."""
    gradients = [p.grad for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    return [g.to_local() if hasattr(g, "to_local") else g for g in dense if g.numel()]


def verdict_of(flags: Sequence[bool], layers: Sequence[str], *, here: bool) -> Verdict:
    """Return the verdict on the flags of all ranks together, see `Seen`.

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
