"""`CurvatureCompanion`: warn of a loss spike while it grows, by the curvature of the loss along the optimizer's update.

Before such a spike the curvature along the update passes the bound beyond which the optimizer's steps grow instead of
settling, see `stabnorm.functional.curvature`. The curvature is measured at some steps only: the loss of the same batch
is computed once more, a little further along the update, and the gradients are compared.
"""

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
from stabnorm.companions._stable_updates import decay_in_gradient, has_bound, metric
from stabnorm.companions.companion import Companion, StepLoss, Watch
from stabnorm.functional import relative_curvature
from stabnorm.statistic import Statistic

_DISTANCE = 1e-4  # size of the move, as a share of the weights': at 1e-3 the loss is no parabola any more
_SAMPLES, _OVER = 4, 3  # an alarm needs so many of so many samples over the bound
_AGREES = 0.05  # largest error of R, or share of it, with which a one-sided difference is trusted


class Curvature(NamedTuple):
    """The samples up to this step.

    Attributes:
        sample: ``[1]``, the relative curvature R of this step; NaN where it was not measured.
        recent: ``[4]``, the last samples, the latest one last; NaN where there were fewer.
    """

    sample: Tensor
    recent: Tensor

    def merge(self, other: "Curvature") -> "Curvature":
        """Return these samples, because all processes have the same."""
        return self


def _lasting(now: Curvature, past: None) -> Tensor:
    """The third largest of the last four samples; it is over a bound if three of them are."""
    del past
    ordered = now.recent.nan_to_num(nan=-torch.inf, posinf=torch.inf).sort().values
    value = ordered[_SAMPLES - _OVER].reshape(1)
    return torch.where(value == -torch.inf, torch.nan, value)


@dataclass(frozen=True)
class CurvatureCompanion(Companion):
    r"""Curvature of the loss along the optimizer's update, as a share of the one at which its steps begin to grow.

    .. math:: R = \frac{d^T H d}{d^T M d},\qquad d = M^{-1} g,\qquad M = b\,P

    with g the gradient as the optimizer gets it, P what the optimizer divides it by (:math:`\sqrt{\hat v} + \epsilon`
    with this step's gradient in v for Adam, 1 for SGD), and b the bound on the eigenvalues of :math:`P^{-1} H`, see
    `stabnorm.functional.stability_bound`. Adam, AdamW and SGD, with and without momentum, have one. Parameters of
    another optimizer do not count, and a warning says so.

    ``monitor.step(closure=...)`` gives it the loss of the batch; `StabilityCallback` does so by itself. Gradients,
    buffers, random state and weights are afterwards what they were, bit for bit. At the steps that it measures it keeps
    two copies of the weights. Weights in 16 bits or sharded ones cannot be watched.

    Args:
        every: number of steps from sample to sample. Default: as many as keep its cost at 2 % of the training's time,
            measured while it runs, and 5 at least.
        both_sides: True moves the weights to both sides, for an error of second order, with two forwards and backwards
            instead of one. Where the gradient that the optimizer gets is not that of the closure's loss, because of
            dropout, clipping, accumulation or loss scaling, both sides are always taken. Default: False.

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
            "update_curvature", formula="d'Hd / d'Md at the steps that are measured; d = M^-1 g the update, M = b P, "
            "b the optimizer's bound of stability", source="arXiv 2207.14484, arXiv 2506.04805", threshold=1.0,
            compute=lambda now, _: now.sample,
            advice="the loss is too curved for this learning rate along the update: steps grow instead of settling",
        ),
        Statistic(
            "lasting_curvature", formula="third largest of the last four samples of update_curvature",
            source="arXiv 2506.04805; rule ours", alarm=1.0, compute=_lasting,
            advice="for 3 of 4 samples the loss has been more curved along the optimizer's update than its learning "
            "rate allows, so that its steps grow instead of settling. A loss spike may follow within some hundred "
            "steps: lower the learning rate, or keep a checkpoint from before. With Adam, a smaller beta2 or a larger "
            "eps helps, too, because the second moment lags behind the gradient",
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
        self._schedule = Schedule(every)
        self._old: dict[int, Tensor] = {}  # weights before the optimizer's step, by index
        self._moves: dict[int, _Move] = {}
        self._loss = StepLoss(None)
        self._recent = torch.full((_SAMPLES,), torch.nan, device="cpu")
        self._trusts_one_side: bool | None = None  # None before the first sample
        self._one_sided_error: AsyncCopy | None = None  # of the first sample, and its R
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
        sample = torch.full((1,), torch.nan, device=device)
        if self._moves and self._loss.closure is None:
            self._complain("the loss is missing: give monitor.step(closure=lambda: loss_function(model(x), y))")
            self._schedule.postpone()
        elif self._moves:
            with self._schedule.sample(device):
                sample = self._sample(list(self._moves.values())).to(sample).reshape(1)
            self._recent = torch.cat([self._recent.to(device)[1:], sample])
        self._schedule.end_step(self._loss.ranks)
        return Curvature(sample, self._recent.to(device))

    def _sample(self, moves: list["_Move"]) -> Tensor:
        size, slope, decay = (_total([getattr(move, part) for move in moves]) for part in ("size", "slope", "decay"))
        before, direction = (_norm([getattr(move, part) for move in moves]) for part in ("before", "direction"))
        distance = _DISTANCE * before / direction
        untouched = all(move.untouched for move in moves)
        if untouched and self._one_side_is_right() and not self.both_sides:
            (ahead,) = self._slopes(moves, [distance])
            return relative_curvature(slope, ahead, distance, size) + decay / size
        behind, ahead = self._slopes(moves, [-distance, distance])
        curvature = relative_curvature(behind, ahead, 2 * distance, size)
        if self._trusts_one_side is None:
            error = relative_curvature(slope, (behind + ahead) / 2, distance, size)
            self._one_sided_error = AsyncCopy(torch.stack([error, curvature]))
        return curvature + decay / size

    def _one_side_is_right(self) -> bool:
        """Whether the first sample has shown that the optimizer's gradient is that of the closure's loss."""
        if self._one_sided_error is not None:
            error, curvature = self._one_sided_error.wait()[0].tolist()
            self._trusts_one_side = abs(error) <= _AGREES * max(1.0, abs(curvature))
            self._one_sided_error = None
        return bool(self._trusts_one_side)

    def _slopes(self, moves: list["_Move"], distances: Sequence[Tensor]) -> Tensor:
        """Return the slope of the loss at these distances along the update, as a mean over processes; NaN on an error.

        The weights are afterwards what they were, bit for bit.
        """
        weights = [move.parameter.detach().clone() for move in moves]
        slopes = torch.full_like(torch.stack(list(distances)), torch.nan)
        try:
            with put_back(self.model), uncounted(), _no_reduction():
                for i, distance in enumerate(distances):
                    for move in moves:
                        move.parameter.copy_(torch.addcmul(move.before, distance.to(move.before), move.direction))
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
        slope = _total([_dot(gradient, move.direction) for gradient, move in pairs if gradient is not None])
        return slope if scale is None else slope / scale

    # -- messages and state --------------------------------------------------------------------------------------------

    def _complain(self, problem: str) -> None:
        self._problem = self._problem or problem

    def complaint(self, values: Tensor) -> str | None:
        """Say why samples are missing."""
        return self._problem

    def state_dict(self) -> dict[str, Any]:
        """Return the last samples, and when the next one is due."""
        self._one_side_is_right()
        return {
            "recent": self._recent.detach().cpu(),
            "trusts_one_side": self._trusts_one_side,
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._recent, self._one_sided_error = state["recent"].clone(), None
        self._trusts_one_side = state["trusts_one_side"]
        self._schedule.load_state_dict(state["schedule"])


@dataclass(frozen=True)
class _Move:
    """How a parameter is moved.

    Attributes:
        parameter: the parameter.
        before: its value before the optimizer's step.
        direction: d = M^-1 (g + c w), with c the weight decay that the optimizer adds to the gradient.
        size: d'Md.
        slope: d'g.
        decay: c d'd, the curvature of the weight decay.
        untouched: whether the gradient is as one backward has left it: not added to, unscaled, clipped or reduced.
    """

    parameter: nn.Parameter
    before: Tensor
    direction: Tensor
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
        d = whole / metric(parameter, optimizer, group)
        return _Move(parameter, before, d, _dot(whole, d), _dot(gradient, d), decay * _dot(d, d), untouched)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.to(b).flatten(), b.flatten())


def _total(numbers: Sequence[Tensor]) -> Tensor:
    """Return the sum of numbers that may be on several devices."""
    return torch.stack([number.to(numbers[0]) for number in numbers]).sum()


def _norm(tensors: list[Tensor]) -> Tensor:
    return _total([norm.square() for norm in torch._foreach_norm(tensors)]).sqrt()


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
