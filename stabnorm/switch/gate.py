"""`AffineGate` switches a layer when its LayerNorm is nearly affine; a layer whose LayerNorm never is keeps it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stabnorm._checks import check_all, check_count, check_number, wrong_type
from stabnorm._states import check_one_each, check_state, load_whole
from stabnorm.companions.readiness import HOLD_ABOVE, MOMENTUM, RUN_BELOW
from stabnorm.companions.readiness import MEASURE_EVERY as MEASURE_EVERY
from stabnorm.errors import StabNormError
from stabnorm.switch.schedules import schedule_end

_TUNED_FRACTION = 0.8  # the constants were found with switches that end at this share of the training

Array = npt.NDArray[np.float64]


class Change(NamedTuple):
    """A decision of the gate about a layer, and the reason."""

    step: int
    layer: str
    state: str
    lam: float
    reason: str


class AffineGate:
    """Switch each layer when its LayerNorm is nearly affine; a layer whose LayerNorm never is keeps it.

    The signal is the *affine residual* A of the statistics catalogue, 1 - mean_c corr(x_c, norm(x)_c)^2: the share of
    the norm's output that no affine map per channel reproduces. It depends on the norm's input alone, so it can be
    measured at any lam. The states of a layer, with S the optimizer steps of the training:

    - *wait*: lam is 1, at least until 0.06 S. When A < 0.30, the layer runs. After 0.45 S it is refused.
    - *run*: lam falls linearly from its present value to exactly 0 at 0.8 S. When A > 0.50, the layer holds (before
      0.45 S) or is refused (between 0.45 S and 0.65 S).
    - *hold*: lam does not change until A is at most 0.50.
    - *refused*: lam rises to 1 again, and the layer keeps its norm to the end.

    With another `fraction` than 0.8 these shares scale with it, and `start` shifts them. The constants come from a
    study on small models. There was a wide gap between layers that can be switched (A below 0.13) and layers that
    cannot (above 0.46).

    Pass the residuals of every `MEASURE_EVERY`-th step to `observe`, and call `advance` for the lam of each step.
    Residuals may arrive some steps late.

    Args:
        layers: names of the layers.
        total: optimizer steps of the training, S.
        start: the step at which the schedule begins. Default: 0.
        fraction: length of the schedule as a share of `total`. Default: 0.8.
        on: a layer runs when A is below this. Default: 0.30.
        off: a running layer holds when A is above this. Default: 0.50.
        warm: share of S before the first decision. Default: 0.06.
        last_start: share of S after which no layer starts or holds. Default: 0.45.
        last_refusal: share of S after which no layer is refused. Default: 0.65.

    Raises:
        ValueError: an argument is out of range, or the schedule is longer than the training.

    >>> gate = AffineGate(["plain", "heavy-tailed"], 100)
    >>> for step in range(101):
    ...     gate.observe(step, [0.05, 0.62])
    ...     lam = gate.advance(step)
    >>> lam, gate.states
    ([0.0, 1.0], ['run', 'refused'])
    >>> gate.reasons[1]
    'affine residual 0.62 stayed above 0.30 until step 46 of 100: keeps its norm'
    """

    def __init__(
        self,
        layers: Sequence[str],
        total: int,
        *,
        start: int = 0,
        fraction: float = 0.8,
        on: float = RUN_BELOW,
        off: float = HOLD_ABOVE,
        warm: float = 0.06,
        last_start: float = 0.45,
        last_refusal: float = 0.65,
    ) -> None:
        check_all("layers", layers, str, "the layers' names")
        shares = {"on": on, "off": off, "warm": warm, "last_start": last_start, "last_refusal": last_refusal}
        for name, share in shares.items():
            check_number(name, share, least=0, most=1)
        if not 0 < on <= off <= 1:
            raise ValueError(f"on={on}, off={off}: a residual lies in [0, 1]. Give 0 < on <= off <= 1")
        if not 0 <= warm <= last_start <= last_refusal <= _TUNED_FRACTION:
            raise ValueError(
                f"warm={warm}, last_start={last_start}, last_refusal={last_refusal} are shares of the training. Give "
                f"them in this order, the last at most {_TUNED_FRACTION}"
            )
        self.layers, self.total, self.on, self.off = tuple(layers), total, on, off
        self.end = schedule_end(total, start=start, fraction=fraction)
        whole = (self.end - start) / _TUNED_FRACTION
        self._warm, self._last_start, self._last_refusal = (
            start + share * whole for share in (warm, last_start, last_refusal)
        )
        self._climb = 6 / (self.end - start)  # back to 1 in at most a sixth of the schedule
        self.step = 0
        self.changes: list[Change] = []  # the reader removes the changes that it has reported
        count = len(self.layers)
        self._lam: Array = np.ones(count)
        self._residual: Array = np.full(count, np.nan)  # running average; NaN: never measured
        self._state = np.full(count, "wait", dtype="<U8")
        self._reasons = ["waits for its affine residual"] * count

    @property
    def lam(self) -> list[float]:
        """The lam of each layer at `step`."""
        return list(self._lam.tolist())

    @property
    def residuals(self) -> list[float]:
        """The running average of each layer's affine residual; NaN if it was never measured."""
        return list(self._residual.tolist())

    @property
    def states(self) -> list[str]:
        """The state of each layer: "wait", "run", "hold" or "refused"."""
        return list(self._state.tolist())

    @property
    def reasons(self) -> list[str]:
        """The reason for the state of each layer."""
        return list(self._reasons)

    @property
    def settled(self) -> bool:
        """Whether no lam will change any more, because each layer is switched or has its norm again."""
        switched, back = self._lam == 0, (self._state == "refused") & (self._lam == 1)
        return bool((switched & (self.step >= self.end) | back).all())

    def observe(self, step: int, residuals: Sequence[float] | Array) -> None:
        """Add a step's affine residuals to the averages: one for each layer, NaN where a layer did not run.

        Raises:
            ValueError: their number is not the number of layers.
        """
        check_count("step", step, 0)
        try:
            new = np.asarray(residuals, np.float64)
        except (TypeError, ValueError) as error:
            raise wrong_type("residuals", residuals, "one number for each layer") from error
        if new.shape != self._residual.shape:
            raise ValueError(f"step {step} brings residuals of shape {new.shape} for {len(self.layers)} layers")
        average = np.where(np.isnan(self._residual), new, (1 - MOMENTUM) * self._residual + MOMENTUM * new)
        self._residual = np.where(np.isfinite(new), average, self._residual)

    def advance(self, step: int) -> list[float]:
        """Advance to a step and return each layer's lam; a second call for the same step returns the same.

        Raises:
            ValueError: the gate is already past this step.
        """
        check_count("step", step, 0)
        if step < self.step:
            raise ValueError(f"the gate is at step {self.step} and does not go back to {step}. Build a new one")
        for now in range(self.step, step):
            self._decide(now)
            run, refused = self._state == "run", self._state == "refused"
            if now < self.end:
                self._lam = np.where(run, self._lam - self._lam / (self.end - now), self._lam)
            self._lam = np.where(refused, np.minimum(self._lam + self._climb, 1), self._lam)
        self.step = step
        return self.lam

    def _decide(self, now: int) -> None:
        if now < self._warm or now >= self.end:
            return
        waiting, holding = self._state == "wait", self._state == "hold"
        moving = (self._state == "run") | holding
        affine, unaffine = self._residual < self.on, self._residual > self.off  # both are False for NaN
        may_wait, may_refuse = now <= self._last_start, now < self._last_refusal
        limit, strict = f"{self.on:.2f}", f"{self.off:.2f}"
        self._set(now, waiting & affine, "run", "affine residual {residual} fell below " + limit + " by {when}")
        if not may_wait:
            late = waiting & ~affine
            why = "affine residual {residual} stayed above " + limit + " until {when}: keeps its norm"
            self._set(now, late & ~np.isnan(self._residual), "refused", why)
            why = "its affine residual was never measured until {when}: keeps its norm"
            self._set(now, late & np.isnan(self._residual), "refused", why)
        if may_wait:
            why = "affine residual {residual} rose above " + strict + " at {when}: waits at lam = {lam}"
            self._set(now, moving & unaffine & ~holding, "hold", why)
        elif may_refuse:
            why = (
                "affine residual {residual} is above " + strict + " at {when}, too late to wait: goes back to its norm"
            )
            self._set(now, moving & unaffine, "refused", why)
        on_again = holding & ~(unaffine & may_wait) & (self._state != "refused")
        self._set(now, on_again, "run", "affine residual {residual} at {when}: goes on from lam = {lam}")

    def _set(self, now: int, which: npt.NDArray[np.bool_], state: str, why: str) -> None:
        self._state[which] = state
        for index in np.flatnonzero(which):
            lam, residual = float(self._lam[index]), f"{self._residual[index]:.2f}"
            reason = why.format(residual=residual, when=f"step {now} of {self.total}", lam=f"{lam:.2f}")
            self._reasons[index] = reason
            self.changes.append(Change(now, self.layers[index], state, lam, reason))

    def state_dict(self) -> dict[str, Any]:
        """Return the gate's state as plain containers."""
        return {
            "version": 1,
            "layers": list(self.layers),
            "step": self.step,
            "lam": self.lam,
            "residual": self.residuals,
            "state": self.states,
            "reasons": self.reasons,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            StabNormError: the state is that of a gate over other layers; nothing is loaded then.
        """
        check_state(state, "AffineGate", self.state_dict())
        load_whole(self, self._load, state)

    def _load(self, state: Mapping[str, Any]) -> None:
        refuse_other_layers("the saved gate is one over", state["layers"], self.layers)
        for part in ("lam", "residual", "state", "reasons"):
            check_one_each(state[part], self.layers)
        self.step = int(state["step"])
        self._lam, self._residual = np.array(state["lam"], np.float64), np.array(state["residual"], np.float64)
        self._state = np.array(state["state"], dtype="<U8")
        self._reasons = list(state["reasons"])


def refuse_other_layers(what: str, saved: Sequence[str], own: Sequence[str]) -> None:
    """Raise StabNormError unless a saved state is about the same layers, in the same order."""
    if list(saved) != list(own):
        raise StabNormError(
            f"{what} other layers: it has {sorted({*saved} - {*own}) or 'no others'}, and lacks "
            f"{sorted({*own} - {*saved}) or 'none'} (or their order differs). Convert the same layers as in that run"
        )
