"""`BranchGap`: how far LayerNorm and RepBN are apart in each layer that is being switched."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._models.calls import input_of, mask_of
from stabnorm._models.hooks import Hook
from stabnorm.nn.prep import PRepBN


class BranchGap:
    r"""How far the two branches of each progressive norm are apart, in training forwards while it is `armed`.

    .. math:: \mathrm{gap} = \|\mathrm{norm}(x) - \mathrm{RepBN}(x)\| / \|\mathrm{norm}(x)\|

    over all valid tokens of a step. It computes both branches once more, so measure it now and then only. It says how
    far a change of lam moves the output. It is no sign of health: in a good run it grows, because RepBN's parameters
    move away from the norm's. In a compiled graph it is not measured.

    Args:
        norms: what `progressive_norms` found.

    >>> from stabnorm.nn import PRepBN
    >>> norm = PRepBN(8)
    >>> gap = BranchGap([norm])
    >>> gap.attach()
    >>> gap.armed = True
    >>> _ = norm(torch.randn(16, 8))
    >>> gap.take().shape
    torch.Size([1])
    """

    def __init__(self, norms: Iterable[PRepBN]) -> None:
        self.armed = False
        self._norms = list(norms)
        self._squares: dict[int, Tensor] = {}  # of the difference and of the norm, [2]
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Put the hooks on the norms."""
        self.detach()
        hooks = (_GapHook(self, index) for index in range(len(self._norms)))
        self._handles = [
            norm.register_forward_pre_hook(hook, with_kwargs=True)
            for norm, hook in zip(self._norms, hooks, strict=True)
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def add(self, index: int, module: PRepBN, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Add one forward of a layer to its sums."""
        norm, rep, valid = module.branches(input_of(args, kwargs), mask_of(args, kwargs))
        squares = torch.stack([(norm - rep).float().square().sum(-1), norm.float().square().sum(-1)])
        squares = (squares if valid is None else torch.where(valid, squares, 0)).sum(-1)
        self._squares[index] = self._squares[index] + squares if index in self._squares else squares

    def discard(self) -> None:
        """Forget the sums since the last `take`."""
        self._squares.clear()

    def take(self) -> Tensor:
        """Give each layer's gap since the last `take`, ``[layers]`` on the device; NaN where the layer did not run."""
        device = self._norms[0].lam.device
        nothing = torch.full((2,), torch.nan, device=device)
        squares = torch.stack([self._squares.get(i, nothing).to(device) for i in range(len(self._norms))])
        self.discard()
        return (squares[:, 0] / squares[:, 1]).sqrt()


class _GapHook(Hook):
    """The hook on one layer."""

    def __init__(self, gap: BranchGap, index: int) -> None:
        self.gap, self.index = gap, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not self.gap.armed or not module.training:
            return
        assert isinstance(module, PRepBN)
        self.gap.add(self.index, module, args, kwargs)
