"""Positions that each block normalises for itself and adds to what its attention reads (LaPE, arXiv 2212.05262)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stabnorm.nn.mixed_in import AddsNorm, MixedIn, mix_in


class HiddenPositions(MixedIn):
    """A mixin over the module that holds the positions: its forward adds zeros, and the blocks add the positions."""

    def computed(self, name: str, parameter: Tensor) -> Tensor:
        """Return what readers of the positions get."""
        del name
        return torch.zeros_like(parameter)


class AddsPositions(AddsNorm):
    r"""A mixin over the norm before an attention, see `stabnorm.remedies.lape`.

    .. math:: y = \mathrm{norm}(x) + p_\ell, \qquad p_\ell = \mathrm{LN}_\ell(p_{\ell - 1})

    Attributes:
        position_norm: the LN of this block.
        position_source: the module that holds the positions, and their name in it; a tuple, so that it is no child.
        position_before: the norms of the blocks before this one, which have their LN; a tuple for the same reason.
    """

    adds_to_a_norm: ClassVar[bool] = True
    adds: ClassVar[tuple[str, ...]] = ("position_norm", "position_source", "position_before")
    position_norm: nn.Module
    position_source: tuple[nn.Module, str]
    position_before: tuple["AddsPositions", ...]

    def positions(self) -> Tensor:
        """Return the positions of this block."""
        holder, name = self.position_source
        p: Any = holder._parameters[name]
        for block in (*self.position_before, self):
            p = block.position_norm(p)
        result: Tensor = p
        return result

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the norm of the input with the positions added."""
        y: Tensor = super().forward(*args, **kwargs)
        return y + self.positions()

    @torch.no_grad()
    def become_plain(self) -> None:
        """Keep the positions of this block as a constant; exact. The blocks behind this one must be done before."""
        constant = self.positions()
        self.leave(AddsPositions)
        mix_in(FixedPositions, self)
        self.register_buffer("position_constant", constant.detach().clone())


class FixedPositions(AddsNorm):
    """A mixin over a norm that adds constant positions to its output, in inference."""

    adds_to_a_norm: ClassVar[bool] = True
    adds: ClassVar[tuple[str, ...]] = ("position_constant",)
    position_constant: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the norm of the input with the positions added."""
        y: Tensor = super().forward(*args, **kwargs)
        return y + self.position_constant
