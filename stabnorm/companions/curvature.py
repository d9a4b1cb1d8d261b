"""`CurvatureCompanion`: warn of a loss spike while it grows, by the curvature of the loss along the optimizer's update.

Before such a spike the curvature along the update passes the bound beyond which the optimizer's steps grow instead of
settling, see `stabnorm.functional.curvature`. The curvature is measured at some steps only: the loss of the same batch
is computed once more, with the weights moved by a whole step, and the gradients are compared.

The weights move by a whole step, and uphill, because that is where spikes announce themselves. Measured before natural
spikes of modular addition (`benchmarks.slingshot`), the curvature at the weights themselves, which is what short moves
give, stays below the bound nearly always, by autograd and in float64 as well; so does the curvature downhill. But one
step uphill the slope becomes up to 10,000 times as steep: the weights come to lie beside a wall that a parabola at the
weights does not show. And a whole step suits every dtype, because it is the scale on which the optimizer itself works.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from stabnorm._checks import check_count, check_flag, check_model
from stabnorm._models.async_copy import AsyncCopy
from stabnorm._models.devices import device_of
from stabnorm._models.hooks import take_off, uncounted
from stabnorm._models.intact import put_back
from stabnorm._models.random_state import random_state_kept
from stabnorm._models.ranks import gather_in_group, is_distributed, ranks
from stabnorm.companions._optimizer_steps import Group, OptimizerSteps
from stabnorm.companions._sampling import Schedule
from stabnorm.companions._stable_updates import decay_in_gradient, has_bound, steady_step
from stabnorm.companions.companion import Companion, StepLoss, Watch
from stabnorm.functional import relative_curvature
from stabnorm.statistic import Statistic

_REACH = 1.0  # of the move, in steps: the module's text says why it is a whole one
# An alarm needs two of eight samples over the bound. Which batches are depends on what they hold: before a spike they
# are rare and then frequent. In calm training no sample came near: at most 0.75 in 5,000 steps near a spike, 0.04 else.
_SAMPLES, _OVER = 8, 2
_NEAR = 0.5  # half of the bound: from there on samples come more often
_AGREES = 0.05  # largest error of R, or share of it, with which the optimizer's gradient is taken for the closure's


class Curvature(NamedTuple):
    """The samples up to this step.

    Attributes:
        sample: ``[1]``, the relative curvature R of this step; NaN where it was not measured.
        recent: ``[8]``, the last samples, the latest one last; NaN where there were fewer.
    """

    sample: Tensor
    recent: Tensor

    def merge(self, other: "Curvature") -> "Curvature":
        """Return these samples, because all processes have the same."""
        return self


def _lasting(now: Curvature, past: None) -> Tensor:
    """The second largest of the last eight samples; it is over a bound if two of them are."""
    del past
    ordered = now.recent.nan_to_num(nan=-torch.inf, posinf=torch.inf).sort().values
    value = ordered[_SAMPLES - _OVER].reshape(1)
    return torch.where(value == -torch.inf, torch.nan, value)


@dataclass(frozen=True)
class CurvatureCompanion(Companion):
    r"""Curvature of the loss along the optimizer's update, as a share of the one at which its steps begin to grow.

    .. math:: R = \frac{s^T (g(w + s) - g(w))}{s^T M s},\qquad M = b\,P

    with g the gradient of this batch, s the step that the optimizer would take if all gradients were as this one, P
    what the optimizer divides by (:math:`\sqrt{\hat v} + \epsilon` with this step's gradient in v for Adam, 1 for SGD),
    and b the bound on the eigenvalues of :math:`P^{-1} H`, see `stabnorm.functional.stability_bound`. On a parabola R
    is :math:`s^T H s / s^T M s`. Adam, AdamW and SGD, with and without momentum, have a bound. Parameters of another
    optimizer do not count, and a warning says so.

    ``monitor.step(closure=...)`` gives it the loss of the batch; `StabilityCallback` does so by itself. Gradients,
    buffers, random state and weights are afterwards what they were, bit for bit. At the steps that it measures it keeps
    two copies of the weights. Weights in 16 bits or sharded ones cannot be watched.

    Args:
        every: number of steps from sample to sample. Default: as many as keep its cost at 2 % of the training's time,
            measured while it runs, and 5 at least. After a sample above 0.5 the next ones come every 5 steps, until
            six in a row are below.
        both_sides: True moves the weights downhill as well, and takes the larger figure of the two. That costs one more
            forward and backward. Default: False.

    Where the gradient that the optimizer gets is not that of the closure's loss, because of dropout, clipping,
    accumulation or loss scaling, the gradient at the weights is computed again, too.

    Raises:
        ValueError: `every` below 1; from `watch`: nothing is trained, or weights that cannot be watched.

    >>> import stabnorm
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    >>> optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.ones(3, 4)
    >>> with stabnorm.StabilityMonitor(model, companions=[CurvatureCompanion(every=1)]) as monitor:
    ...     model(x).square().mean().backward()
    ...     optimizer.step()
    ...     monitor.step(closure=lambda: model(x).square().mean())
    >>> monitor.companions["curvature"].history()["update_curvature"].shape
    torch.Size([1, 1])
    """

    every: int | None = None
    both_sides: bool = False

    name: ClassVar[str] = "curvature"
    cost: ClassVar[str] = "a forward and a backward, or two, at some steps; 2 % of the time"
    computes_loss: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(
            "update_curvature", formula="s'(g(w + s) - g(w)) / s'Ms at the steps that are measured; s the optimizer's "
            "step, M = b P, b its bound of stability", source="arXiv 2207.14484, arXiv 2506.04805", threshold=1.0,
            compute=lambda now, _: now.sample,
            advice="the loss is too curved for this learning rate within one step of the weights: steps grow instead "
            "of settling",
        ),
        Statistic(
            "lasting_curvature", formula="second largest of the last eight samples of update_curvature",
            source="arXiv 2506.04805; rule ours", alarm=1.0, compute=_lasting,
            advice="in 2 of 8 samples the loss was more curved, within one step of the weights, than this learning "
            "rate allows, so that steps grow instead of settling. A loss spike may follow within some hundred steps: "
            "lower the learning rate, or keep a checkpoint from before. With Adam, a smaller beta2 or a larger eps "
            "helps, too, because the second moment lags behind the gradient",
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.every is not None:
            check_count("every", self.every, hint=", or None for a budget of time")
        check_flag("both_sides", self.both_sides)

    def watch(self, model: nn.Module) -> "CurvatureWatch":
        """Check that the weights can be watched."""
        check_model("model", model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError(
                f"{type(model).__name__} has no parameter that is trained. Leave the companion 'curvature' out"
            )
        for name, parameter in trained.items():
            if is_distributed(parameter):
                raise ValueError(
                    f"{name} is sharded over processes, and the companion 'curvature' needs whole weights. Leave it out"
                )
            if parameter.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"{name} is in {parameter.dtype}, which is too coarse to move the weights a little. Leave the "
                    "companion 'curvature' out, or keep the weights in float32 (mixed precision)"
                )
        return CurvatureWatch(model, self.every, self.both_sides)


class CurvatureWatch(Watch):
    """Measures the curvature at some steps; see `CurvatureCompanion`."""

    rows = ("update",)

    def __init__(self, model: nn.Module, every: int | None, both_sides: bool) -> None:
        self.model, self.both_sides = model, both_sides
        self._parameters = list(model.parameters())
        self._steps = OptimizerSteps(self._parameters, self._before, self._after)
        self._schedule = Schedule(every, _NEAR)
        self._old: dict[int, Tensor] = {}  # weights before the optimizer's step, by index
        self._moves: dict[int, _Move] = {}
        self._loss = StepLoss(None)
        self._recent = torch.full((_SAMPLES,), torch.nan, dtype=torch.float32, device="cpu")
        self._knows_slope: bool | None = None  # None before the first sample
        self._slope_error: AsyncCopy | None = None  # of the first sample, and its R
        self._problem: str | None = None

    def attach(self) -> None:
        """Register hooks before and after optimizer steps."""
        self._steps.attach()
        self.discard()

    def detach(self) -> None:
        """Remove the hooks, and free the copies of the weights."""
        self._steps.detach()
        self.discard()

    def discard(self) -> None:
        """Discard the last step."""
        self._old.clear()
        self._moves.clear()
        self._loss = StepLoss(None)

    def see_loss(self, loss: StepLoss) -> None:
        """Take the loss of this step."""
        self._loss = loss

    # -- the optimizer's step ------------------------------------------------------------------------------------------

    def _before(self, rows: list[int], optimizer: torch.optim.Optimizer, group: Group) -> None:
        if self._schedule.due and has_bound(optimizer, group):
            for row in rows:
                if row not in self._old and self._parameters[row].requires_grad:
                    self._old[row] = self._parameters[row].detach().clone()

    def _after(self, rows: list[int], optimizer: torch.optim.Optimizer, group: Group) -> None:
        if not self._schedule.due:
            return
        if has_bound(optimizer, group):
            for row in rows:
                if row in self._old and self._parameters[row].grad is not None:
                    self._moves[row] = _Move.of(self._parameters[row], self._old[row], optimizer, group)
        elif self._moves.keys().isdisjoint(rows):  # else it wraps an optimizer that has a bound
            self._complain(
                f"no bound is known for the optimizer {type(optimizer).__name__}"
                f"{' with maximize=True' if group.get('maximize') else ''}, only for Adam, AdamW and SGD: its "
                "parameters do not count"
            )

    # -- a sample ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def take(self) -> Curvature:
        """Return the samples so far; measure one if this step is due and the loss was given."""
        device = self._parameters[0].device
        sample = torch.full((1,), torch.nan, dtype=torch.float32, device=device)
        if self._moves and self._loss.closure is None:
            self._complain("the loss is missing: give monitor.step(closure=lambda: loss_function(model(x), y))")
            self._schedule.postpone()
        elif self._moves:
            with self._schedule.sample(device):
                sample = self._sample(list(self._moves.values())).to(sample).reshape(1)
                self._schedule.see(sample)
            self._recent = torch.cat([self._recent.to(device)[1:], sample])
        self._schedule.end_step(self._loss.ranks)
        return Curvature(sample, self._recent.to(device))

    def _sample(self, moves: list["_Move"]) -> Tensor:
        size, slope, decay = (_total([getattr(move, part) for move in moves]) for part in ("size", "slope", "decay"))
        knows_slope = all(move.untouched for move in moves) and self._slope_is_right()
        sides = [_REACH, -_REACH] if self.both_sides else [_REACH]
        slopes = self._slopes(moves, sides if knows_slope else [*sides, 0.0])
        here = slope if knows_slope else slopes[-1]
        curvature = torch.stack([
            relative_curvature(here, there, side, size) for side, there in zip(sides, slopes, strict=False)
        ]).amax()  # fmt: skip
        if self._knows_slope is None:
            error = relative_curvature(slope, here, _REACH, size)
            self._slope_error = AsyncCopy(torch.stack([error, curvature]))
        return curvature + decay / size

    def _slope_is_right(self) -> bool:
        """Whether the first sample has shown that the optimizer's gradient is that of the closure's loss."""
        if self._slope_error is not None:
            error, curvature = self._slope_error.wait()[0].tolist()
            if not math.isnan(error):  # it is where the learning rate is 0
                self._knows_slope = abs(error) <= _AGREES * max(1.0, abs(curvature))
            self._slope_error = None
        return bool(self._knows_slope)

    def _slopes(self, moves: list["_Move"], distances: Sequence[float]) -> Tensor:
        """Return s'g at these distances in steps, uphill, as a mean over processes; NaN on an error.

        The weights are afterwards what they were, bit for bit.
        """
        weights = [move.parameter.detach().clone() for move in moves]
        slopes = torch.full((len(distances),), torch.nan, dtype=moves[0].size.dtype, device=moves[0].size.device)
        try:
            with put_back(self.model), uncounted(), _no_reduction():
                for i, distance in enumerate(distances):
                    for move in moves:
                        move.parameter.copy_(torch.add(move.before, move.step, alpha=distance))
                    slopes[i] = self._slope(moves)
        except Exception as error:  # the sample is lost, and the training goes on
            self._complain(f"the loss could not be computed again: {type(error).__name__}: {error}")
        finally:
            for move, weight in zip(moves, weights, strict=True):
                move.parameter.copy_(weight)
            torch.clear_autocast_cache()
        merged_over = self._loss.ranks
        group = None if isinstance(merged_over, bool) else merged_over
        return gather_in_group(slopes, group).mean(0) if merged_over and ranks(group) > 1 else slopes

    def _slope(self, moves: list["_Move"]) -> Tensor:
        torch.clear_autocast_cache()  # it has the weights from before the move
        closure, scale = self._loss.closure, self._loss.scale
        assert closure is not None
        with random_state_kept(device_of(self.model)), torch.enable_grad():
            loss = closure()
            if loss is None:
                raise ValueError("the closure returned None")
            scaled = loss if scale is None else loss * scale
            gradients = torch.autograd.grad(scaled, [move.parameter for move in moves], allow_unused=True)
        pairs = zip(gradients, moves, strict=True)
        slope = _total([_dot(gradient, move.step) for gradient, move in pairs if gradient is not None])
        return slope if scale is None else slope / scale

    # -- messages and state --------------------------------------------------------------------------------------------

    def _complain(self, problem: str) -> None:
        self._problem = self._problem or problem

    def complaint(self, values: Tensor) -> str | None:
        """Say why samples are missing."""
        return self._problem

    def state_dict(self) -> dict[str, Any]:
        """Return the last samples, and when the next one is due."""
        self._slope_is_right()
        return {
            "recent": self._recent.detach().cpu(),
            "knows_slope": self._knows_slope,
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        none = torch.full((_SAMPLES,), torch.nan, dtype=torch.float32, device="cpu")
        self._recent, self._slope_error = torch.cat([none, state["recent"].cpu()])[-_SAMPLES:], None
        self._knows_slope = state["knows_slope"]
        self._schedule.load_state_dict(state["schedule"])


@dataclass(frozen=True)
class _Move:
    """How a parameter is moved.

    Attributes:
        parameter: the parameter.
        before: its value before the optimizer's step.
        step: s, what the optimizer would take from it if all gradients were g + c w, with c the weight decay that it
            adds to the gradient.
        size: s'Ms.
        slope: s'g.
        decay: c s's, the curvature of the weight decay.
        untouched: whether the gradient is as one backward has left it: not added to, unscaled, clipped or reduced.
    """

    parameter: nn.Parameter
    before: Tensor
    step: Tensor
    size: Tensor
    slope: Tensor
    decay: Tensor
    untouched: bool

    @staticmethod
    def of(parameter: nn.Parameter, before: Tensor, optimizer: torch.optim.Optimizer, group: Group) -> "_Move":
        """Read the optimizer's state right after its step."""
        assert parameter.grad is not None
        gradient = parameter.grad.detach()
        untouched = gradient._version == 0
        gradient = (gradient.to_dense() if gradient.is_sparse else gradient).to(before)
        decay = decay_in_gradient(optimizer, group)
        whole = torch.add(gradient, before, alpha=decay) if decay else gradient
        step, reach = steady_step(whole, parameter, optimizer, group)
        return _Move(
            parameter,
            before,
            step,
            reach * _dot(whole, step),
            _dot(gradient, step),
            decay * _dot(step, step),
            untouched,
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.to(b).flatten(), b.flatten())


def _total(numbers: Sequence[Tensor]) -> Tensor:
    """Return the sum of numbers that may be on several devices."""
    return torch.stack([number.to(numbers[0]) for number in numbers]).sum()


@contextmanager
def _no_reduction() -> Iterator[None]:
    """Let `DistributedDataParallel` run without preparing to reduce gradients, as in its `no_sync`."""
    silenced: list[DistributedDataParallel] = []

    def silence(module: nn.Module, args: Any) -> None:
        if isinstance(module, DistributedDataParallel) and module.require_backward_grad_sync:
            module.require_backward_grad_sync = False
            silenced.append(module)

    # A hook on all modules would make compiled graphs be compiled again, so a single process gets none.
    handles = [register_module_forward_pre_hook(silence)] if ranks() > 1 else []
    try:
        yield
    finally:
        take_off(handles)
        for module in silenced:
            module.require_backward_grad_sync = True
