"""`SwitchCompanion`: measure how ready each norm is for a switch, and the gap between the branches of a PRepBN."""

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stabnorm._checks import check_model, list_of
from stabnorm._models.calls import input_of, mask_of
from stabnorm._models.hooks import Hook, counting_paused, take_off
from stabnorm._models.names import NameFilter
from stabnorm._models.watched import Watcher, Watching
from stabnorm.companions._optimizer_steps import Indices
from stabnorm.companions.companion import Companion, NormMoments, Watch
from stabnorm.companions.readiness import HOLD_ABOVE, MEASURE_EVERY, MOMENTUM, RUN_BELOW
from stabnorm.nn._progressive import ProgressiveNorm
from stabnorm.norms import find_norms
from stabnorm.statistic import Statistic


class SwitchSums(NamedTuple):
    """Data of one step, ``[norms]`` each; NaN where there is none.

    Attributes:
        residual: moving average of the affine residual, merged over ranks by the monitor.
        difference: sum over tokens of ||norm(x) - RepBN(x)||^2.
        norm: sum over tokens of ||norm(x)||^2.
    """

    residual: Tensor
    difference: Tensor
    norm: Tensor

    def merge(self, other: "SwitchSums") -> "SwitchSums":
        """Merge the data of two processes, each of which has its own part of the batch."""
        return SwitchSums(self.residual, self.difference + other.difference, self.norm + other.norm)


def _readiness(sums: SwitchSums, past: None) -> Tensor:
    del past
    return ((HOLD_ABOVE - sums.residual) / (HOLD_ABOVE - RUN_BELOW)).clamp(0, 1)


@dataclass(frozen=True)
class SwitchCompanion(Companion):
    """Readiness of every norm for the switch, and the gap between the branches of every `PRepBN`.

    Args:
        include: a regular expression, or a list of them, that a norm's name must match. Default: all.
        exclude: the same for norms to leave out. Default: none.

    Raises:
        ValueError: from `watch`: no norm found.

    The readiness of a norm that the monitor leaves out is NaN, and so is the gap of a norm that is no `PRepBN`.

    >>> import stabnorm
    >>> from stabnorm.nn import PRepBN
    >>> model = nn.Sequential(nn.LayerNorm(8), PRepBN(8))
    >>> with stabnorm.StabilityMonitor(model, companions=["switch"]) as monitor:
    ...     _ = model(torch.randn(64, 8))
    ...     monitor.step()
    >>> monitor.companions["switch"].rows
    ('0', '1')
    >>> monitor.companions["switch"].history()["switch_gap"].isnan()
    tensor([[ True, False]])
    """

    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    name: ClassVar[str] = "switch"
    cost: ClassVar[str] = "five passes, or none beside `affine_residual`; both branches once more, at every 4th step"
    needs: ClassVar[frozenset[str]] = frozenset({"normalized"})
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(
            "switch_readiness", "A", f"({HOLD_ABOVE:g} - A) / ({HOLD_ABOVE:g} - {RUN_BELOW:g}) between 0 and 1, A the "
            "moving average of affine_residual (momentum 0.1): 1 where the adaptive switch would run the layer, 0 "
            "where it would hold it", "channel", source="ours", compute=_readiness,
        ),
        Statistic(
            "switch_gap", "A1", "||norm(x) - RepBN(x)|| / ||norm(x)|| of a PRepBN, at every 4th step: what a step of "
            "lam moves; no sign of health; NaN in between, elsewhere, and in a compiled model",
            source="SLAB, arXiv 2405.11582", compute=lambda sums, _: (sums.difference / sums.norm).sqrt(),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        NameFilter(self.include, self.exclude)  # complain now

    def watch(self, model: nn.Module) -> "SwitchWatch":
        """Find the norms."""
        check_model("model", model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the monitor has said which other layers look like norms
            norms = find_norms(model, include=self.include, exclude=self.exclude)
        if not norms:
            raise ValueError(
                f"no normalization layer found in {type(model).__name__} under include={self.include!r}, "
                f"exclude={self.exclude!r}: leave the companion 'switch' out"
            )
        return SwitchWatch({norm.name: norm.module for norm in norms})


class SwitchWatch(Watch):
    """Averages affine residuals, and hooks the norms that have branches; see `SwitchCompanion`."""

    def __init__(self, norms: Mapping[str, nn.Module]) -> None:
        self.rows = tuple(norms)
        self._progressive = [row for row, norm in enumerate(norms.values()) if isinstance(norm, ProgressiveNorm)]
        self._gap = BranchGap([norm for norm in norms.values() if isinstance(norm, ProgressiveNorm)])
        self._residual: Tensor | None = None
        self._ran: Tensor | None = None
        self._steps = 0
        self._indices = Indices()

    def attach(self) -> None:
        """Register the hooks; the first step is measured, and every 4th one after it, also after a resume."""
        self._gap.attach()
        self._arm()

    def detach(self) -> None:
        """Take the hooks off."""
        self._gap.detach()

    def discard(self) -> None:
        """Discard the branches that were compared since the last step."""
        self._gap.discard()

    def see_norms(self, layers: Sequence[str], now: NormMoments) -> None:
        """Add the affine residuals of a step to their averages."""
        known = [row for row, name in enumerate(self.rows) if name in layers]
        to = self._indices.on(now.ran.device, known)
        of = self._indices.on(now.ran.device, [layers.index(self.rows[row]) for row in known])
        new = now.affine_residual.new_full((len(self.rows),), torch.nan).index_copy_(0, to, now.affine_residual[of])
        self._ran = now.ran.new_zeros(len(self.rows)).index_copy_(0, to, now.ran[of])
        old = torch.full_like(new, torch.nan) if self._residual is None else self._residual.to(new)
        average = torch.where(old.isnan(), new, torch.lerp(old, new, MOMENTUM))
        self._residual = torch.where(self._ran & torch.isfinite(new), average, old)

    @torch.no_grad()
    def take(self) -> SwitchSums:
        """Return the averages merged over ranks, and the branches of this process."""
        assert self._residual is not None  # the monitor has shown its norms
        assert self._ran is not None
        squares = torch.full((len(self.rows), 2), torch.nan, dtype=torch.float32, device=self._residual.device)
        if self._gap.armed and self._progressive:
            to = self._indices.on(squares.device, self._progressive)
            squares.index_copy_(0, to, self._gap.take_squares().to(squares))
        self.seconds = self._gap.seconds
        self._steps += 1
        self._arm()
        return SwitchSums(torch.where(self._ran, self._residual, torch.nan), squares[:, 0], squares[:, 1])

    def _arm(self) -> None:
        self._gap.armed = self._steps % MEASURE_EVERY == 0

    def complaint(self, values: Tensor) -> str | None:
        """Return nothing, because the monitor warns about norms that did not run."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, and the number of steps, which says when the gap is measured next."""
        averages = {} if self._residual is None else {"residual": self._residual.cpu()}
        return {"steps": self._steps, **averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._residual, self._steps = state.get("residual"), int(state.get("steps", 0))
        self._arm()


class BranchGap:
    r"""Measures the gap between the two branches of each progressive norm, in training forwards while it is `armed`.

    .. math:: \mathrm{gap} = \|\mathrm{norm}(x) - \mathrm{RepBN}(x)\| / \|\mathrm{norm}(x)\|

    over all valid tokens of a step. It computes both branches again, so it is only used at some steps. It says how far
    a step of lam moves the output. It is no sign of health: in a good run it grows, because RepBN's parameters are
    trained. It is not measured in a compiled graph.

    Args:
        norms: what `stabnorm.switch.progressive_norms` found.

    >>> from stabnorm.nn import PRepBN
    >>> norm = PRepBN(8)
    >>> gap = BranchGap([norm])
    >>> gap.attach()
    >>> gap.armed = True
    >>> _ = norm(torch.randn(16, 8))
    >>> gap.take().shape
    torch.Size([1])
    """

    def __init__(self, norms: Iterable[ProgressiveNorm]) -> None:
        self.armed = False
        self.seconds = 0.0  # in hooks, on the host
        self._norms = list_of("norms", norms, ProgressiveNorm)
        self._squares: dict[int, Tensor] = {}  # of the difference and of the norm, [2]
        self._handles: list[Watching] = []

    def attach(self) -> None:
        """Put the hooks on."""
        self.detach()
        self._handles = [Watching(norm, Watcher(_GapHook(self, index))) for index, norm in enumerate(self._norms)]

    def detach(self) -> None:
        """Take the hooks off."""
        take_off(self._handles)

    @torch.no_grad()
    def add(self, index: int, module: ProgressiveNorm, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Add one forward of a layer."""
        start = time.perf_counter()
        norm, rep, valid = module.branches(input_of(args, kwargs), mask_of(args, kwargs))
        squares = torch.stack([(norm - rep).float().square().sum(-1), norm.float().square().sum(-1)])
        squares = (squares if valid is None else torch.where(valid, squares, 0)).sum(-1)
        self._squares[index] = self._squares[index] + squares if index in self._squares else squares
        self.seconds += time.perf_counter() - start

    def discard(self) -> None:
        """Forget what was added since the last time."""
        self._squares.clear()

    def take_squares(self) -> Tensor:
        """Return squared distance of the branches and squared norm size, ``[layers, 2]``; NaN if it did not run."""
        device = self._norms[0].lam.device
        nothing = torch.full((2,), torch.nan, dtype=torch.float32, device=device)
        squares = torch.stack([self._squares.get(i, nothing).to(device) for i in range(len(self._norms))])
        self.discard()
        return squares

    def take(self) -> Tensor:
        """Return each layer's gap since the last call, ``[layers]`` on the device; NaN if it did not run."""
        squares = self.take_squares()
        return (squares[:, 0] / squares[:, 1]).sqrt()


class _GapHook(Hook):
    """Forward pre-hook of a layer that has two branches."""

    def __init__(self, gap: BranchGap, index: int) -> None:
        self.gap, self.index = gap, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or counting_paused() or not self.gap.armed or not module.training:
            return
        assert isinstance(module, ProgressiveNorm)
        self.gap.add(self.index, module, args, kwargs)
