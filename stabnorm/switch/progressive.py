"""`ProgressiveSwitch` switches a converted model from LayerNorm to RepBN while it trains, in any training loop."""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from stabnorm._checks import check_count, check_has_numbers, check_instance, check_model, check_scalar
from stabnorm._models.tables import aligned
from stabnorm._states import check_one_each, check_state, load_whole
from stabnorm.companions.switching import BranchGap
from stabnorm.errors import StabNormError
from stabnorm.monitor.catalogue.affinity import AFFINE_RESIDUAL
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.nn._over_norm import norm_class
from stabnorm.switch.gate import MEASURE_EVERY, AffineGate, Change, refuse_other_layers
from stabnorm.switch.hold import Waiting
from stabnorm.switch.lam import progressive_norms, running_norms, write_lam, write_loss_scale, write_step
from stabnorm.switch.residuals import ResidualFeed, watches
from stabnorm.switch.schedules import Order, check_plan, make_schedule


class SwitchRecorder(Protocol):
    """Receives the events of each step."""

    def add(self, row: int, lam: list[float], gap: Tensor | None) -> None:
        """Record a finished step: its lam, and every few steps the branch gap, on the device."""

    def change(self, row: int, change: Change) -> None:
        """Record a decision of the gate."""


class ProgressiveSwitch:
    """Move lam of a model that `convert_norms` has converted, and tell its norms the steps and the loss scale.

    Call `begin` before each forward of the training, `step` after each optimizer step, `close` at the end. Lam changes
    between optimizer steps only, so gradients may be accumulated, and a step may have several forwards. Lam never rises
    above its value at the beginning: a layer that was switched before stays switched.

    With ``schedule="adaptive"`` an `AffineGate` decides. A monitor measures for it: the given one if it watches the
    affine residual of every layer, else one of the switch's own, which has its hooks on at every 4th step only. The lam
    of step t depends on the residuals of the steps up to 4 (t // 4) - 4.

    Args:
        model: a converted model.
        total_steps: optimizer steps of the training.
        schedule: "linear", "cosine", "constant", "adaptive", or a function of the step.
            Default: "adaptive".
        start: the step at which the switch begins. Default: 0.
        fraction: how long it takes, as a share of `total_steps`. Default: 0.8.
        order: "together", "shallow_first" or "deep_first", see `stabnorm.switch.schedules.linear`; the last two need a
            schedule by name, and not "adaptive". Default: "together".
        monitor: one that is attached to the model and stepped by the training. Default: none.

    Raises:
        ValueError: an argument is out of range, or the schedule is longer than the training.
        StabNormError: the model has no norm of this package.

    >>> import torch
    >>> from stabnorm.nn import PRepBN
    >>> model = nn.Sequential(nn.Linear(4, 8), PRepBN(8))
    >>> switch = ProgressiveSwitch(model, total_steps=10, schedule="linear")
    >>> lams = []
    >>> for _ in range(10):
    ...     switch.begin()
    ...     lams += switch.lam
    ...     _ = model(torch.randn(16, 4))  # and a backward, and an optimizer step
    ...     switch.step()
    >>> switch.close()
    >>> lams
    [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    >>> print(switch.summary())
    1 of 1 layers switched to RepBN, which is affine in eval
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        schedule: str | Callable[[int], float] = "adaptive",
        *,
        start: int = 0,
        fraction: float = 0.8,
        order: Order = "together",
        monitor: StabilityMonitor | None = None,
    ) -> None:
        check_model("model", model)
        check_count("total_steps", total_steps)
        check_plan(schedule, start, fraction, order)
        if monitor is not None:
            check_instance("monitor", monitor, StabilityMonitor, "a StabilityMonitor, or leave it out")
        self.norms, self._running = progressive_norms(model), running_norms(model)
        if not self._running:
            raise StabNormError(
                f"{type(model).__name__} has no norm to switch. Convert it first, with stabnorm.convert_norms"
            )
        for norm in self._running.values():
            check_has_numbers(norm, "to switch")
        self.layers, self.total_steps, self.schedule = tuple(self.norms), total_steps, schedule
        self.gate = None
        if schedule == "adaptive":
            self.gate = AffineGate(self.layers, total_steps, start=start, fraction=fraction)
            self._plan: Callable[[int], list[float]] = self.gate.advance
        else:
            options: dict[str, Any] = {"start": start, "fraction": fraction, "order": order}
            self._plan = make_schedule(schedule, total_steps, len(self.layers), **options)
        self.recorder: SwitchRecorder | None = None
        self.steps_done, self.row = 0, 0  # `row` counts the steps of several optimizers as one
        self._waiting = Waiting(len(self.layers))
        self._ceiling = [float(norm.lam) for norm in self.norms.values()]
        self._monitor, self._feed = None, None
        if self.gate is not None and self.layers:
            if monitor is None or not watches(monitor, self.layers):
                monitor = self._monitor = _own_monitor(model, self.layers)
            self._feed = ResidualFeed(monitor, self.gate)
        self._gap = BranchGap(self.norms.values()) if self.layers else None
        if self._gap is not None:
            self._gap.attach()
        self._open = False
        self.lam: list[float] = []
        self.move_to(0)

    def __repr__(self) -> str:
        switched = sum(lam == 0 for lam in self.lam)
        return (
            f"ProgressiveSwitch({len(self.layers)} layers, schedule={self.schedule!r}: step {self.steps_done} of "
            f"{self.total_steps}, {switched} switched)"
        )

    @property
    def _measures(self) -> bool:
        return self.row % MEASURE_EVERY == 0

    def begin(self, loss_scale: Tensor | float | None = None) -> None:
        """Call before each training forward.

        Args:
            loss_scale: what the loss will be multiplied by, ``scaler.get_scale()`` or the scaler's own tensor.
                Default: 1.
        """
        if loss_scale is not None:
            check_scalar("loss_scale", loss_scale, above=0)
            write_loss_scale(self._running.values(), loss_scale)
        if self._open:
            return
        self._open = True
        if self._gap is not None:
            self._gap.armed = self._measures and any(self.lam)
        if self._monitor is not None and self._measures:
            self._monitor.attach()

    def step(self, steps_done: int | None = None) -> None:
        """Call after each optimizer step.

        Args:
            steps_done: how many there were. Default: one more than before.
        """
        if steps_done is not None:
            check_count("steps_done", steps_done, 0)
        gap = None
        if self._monitor is not None and self._measures and self._open:
            self._monitor.steps_done = self.row
            self._monitor.step()
            self._monitor.detach()
        if self._gap is not None and self._gap.armed:
            self._gap.armed = False
            gap = self._gap.take()
        if self.recorder is not None and self.layers:
            self.recorder.add(self.row, self.lam, gap)
        self._open = False
        self.row += 1
        if self._feed is not None and self._measures:
            self._feed.deliver()
        self.move_to(self.steps_done + 1 if steps_done is None else steps_done)

    def move_to(self, steps_done: int) -> None:
        """Set lam and counters to what they are after so many optimizer steps."""
        self.steps_done = steps_done
        before = self.lam or self._ceiling
        planned = self._waiting.apply(steps_done, self._plan(steps_done))
        self.lam = [min(lam, most) for lam, most in zip(planned, self._ceiling, strict=True)]
        for norm, was, now in zip(self.norms.values(), before, self.lam, strict=True):
            if was == 1 > now:
                norm.start_from_norm()
        if self.gate is not None:
            for change in self.gate.changes:
                if self.recorder is not None:
                    self.recorder.change(self.row, change)
            self.gate.changes.clear()
        self.write()

    def hold(self, steps: int) -> None:
        """Leave every lam where it is for so many steps, as far as the schedule can still come to 0 in its time."""
        check_count("steps", steps)
        self._waiting.hold(self.lam, self.steps_done + steps)

    def write(self) -> None:
        """Write lam and counters into the model once more, in case something has overwritten its buffers."""
        write_lam(self.norms.values(), self.lam, settled=self.gate is not None and self.gate.settled)
        write_step(self._running.values(), self.steps_done)

    def close(self) -> None:
        """Remove the hooks, and let the norms count their own forwards again; lam stays where it is."""
        for norm in self._running.values():
            norm.counts_steps = True
        if self._gap is not None:
            self._gap.detach()
        if self._feed is not None:
            self._feed.close()
        if self._monitor is not None:
            self._monitor.detach()

    # -- the result ----------------------------------------------------------------------------------------------------

    @property
    def kept(self) -> dict[str, str]:
        """The layers that the gate has refused, with the reasons."""
        if self.gate is None:
            return {}
        decisions = zip(self.layers, self.gate.states, self.gate.reasons, strict=True)
        return {layer: reason for layer, state, reason in decisions if state == "refused"}

    def summary(self) -> str:
        """Return a short table: how many layers were switched, and why the others were not."""
        switched = [layer for layer, lam in zip(self.layers, self.lam, strict=True) if lam == 0]
        to = " or ".join(sorted({type(norm.rep).__name__ for norm in self.norms.values()})) or "RepBN"
        lines = [f"{len(switched)} of {len(self.layers)} layers switched to {to}, which is affine in eval"]
        names = {layer: norm_class(norm).__name__ for layer, norm in self.norms.items()}
        rows = [(layer, f"keeps {names[layer]}", reason) for layer, reason in self.kept.items()]
        for layer, lam in zip(self.layers, self.lam, strict=True):
            if lam > 0 and layer not in self.kept:
                why = f"the training ended at step {self.steps_done}, before the switch was over"
                rows.append((layer, f"lam = {lam:.3g}", why))
        return "\n".join([*lines, *aligned(rows, indent=2)])

    # -- resume --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the switch as plain containers."""
        return {
            "version": 1,
            "layers": list(self.layers),
            "total_steps": self.total_steps,
            "steps_done": self.steps_done,
            "row": self.row,
            "ceiling": list(self._ceiling),
            "lam": list(self.lam),
            "gate": None if self.gate is None else self.gate.state_dict(),
            "waiting": self._waiting.state_dict(),
            "pending": {} if self._feed is None else self._feed.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the length of the training is the one given to the constructor.

        Raises:
            TypeError: the state is no dict.
            ValueError: it is not that of a switch; nothing is loaded then.
            StabNormError: other layers were switched, or by another kind of schedule; nothing is loaded then.
        """
        check_state(state, "ProgressiveSwitch", self.state_dict().keys() - {"waiting"})  # which older ones lack
        load_whole(self, self._load, state)

    def _load(self, state: Mapping[str, Any]) -> None:
        refuse_other_layers("the checkpoint switches", state["layers"], self.layers)
        if (state["gate"] is None) != (self.gate is None):
            adaptive = "the checkpoint's" if self.gate is None else "this run's"
            raise StabNormError(
                f"of the checkpoint's schedule and this run's only {adaptive} is adaptive, and lam would jump. Resume "
                "with the schedule of that run"
            )
        self._ceiling, self.lam = list(map(float, state["ceiling"])), list(map(float, state["lam"]))
        for values in (self._ceiling, self.lam):
            check_one_each(values, self.layers)
        if "waiting" in state:
            self._waiting.load_state_dict(state["waiting"])
        if self.gate is not None:
            self.gate.load_state_dict(state["gate"])
        if self._feed is not None:
            self._feed.load_state_dict(state["pending"])
        self.row = int(state["row"])
        self.move_to(int(state["steps_done"]))


def _own_monitor(model: nn.Module, layers: tuple[str, ...]) -> StabilityMonitor:
    """Return a monitor of the affine residual alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the conversion has already named other layers that look like norms
        return StabilityMonitor(
            model, [AFFINE_RESIDUAL], include=[f"^{re.escape(layer)}$" for layer in layers], gradients=False
        )
