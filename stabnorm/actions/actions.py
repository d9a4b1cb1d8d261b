"""`Actions`: at each alarm of a training, do what was asked for its kind."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from stabnorm._checks import check_choice, shown, wrong_type
from stabnorm.actions.action import Action, OutOfBudget, Training, Why, Worker
from stabnorm.actions.checkpoint import Checkpoint
from stabnorm.actions.clip import Clip
from stabnorm.actions.hold_switch import HoldSwitch
from stabnorm.actions.qk_clip import QKClip
from stabnorm.actions.reduce_lr import ReduceLR
from stabnorm.actions.rollback import Rollback
from stabnorm.actions.skip import Skip
from stabnorm.actions.stop import Stop
from stabnorm.monitor.onsets import Onset
from stabnorm.monitor.outputs import cause, say
from stabnorm.monitor.verdict import NON_FINITE, SPIKE, Verdict

KINDS: Mapping[str, str] = {
    NON_FINITE: "a NaN or an infinity in the input of a norm, in the loss or in a gradient",
    SPIKE: "one of these is far above its past, before the optimizer has stepped",
    "bound": "a value crosses a fixed bound",
    "one_layer": "one layer leaves its usual range",
    "from_here_on": "a layer and those behind it leave it",
    "everywhere": "nearly all layers leave it at once",
    "training": "the loss or gradients leave it, and no input of a layer does",
    "any": "each of these",
}
BEFORE_STEP = (NON_FINITE, SPIKE)  # the kinds that are known before the optimizer steps

ACTIONS: Mapping[str, type[Action]] = {
    one.name: one for one in (Checkpoint, Clip, HoldSwitch, QKClip, ReduceLR, Rollback, Skip, Stop)
}
LOG = "log"  # which is done in any case

Asked = str | Action | Sequence[str | Action]


class Done(NamedTuple):
    """What was done at an alarm.

    Attributes:
        action: its name.
        why: the alarm.
        words: what was done.
    """

    action: str
    why: Why
    words: str


def resolve_actions(actions: Mapping[str, Asked]) -> dict[str, tuple[Action, ...]]:
    """Return the actions of each kind of alarm.

    Args:
        actions: kind -> a name, an object of `stabnorm.actions`, or a list of them.

    Raises:
        TypeError: it is no mapping of such.
        ValueError: an unknown kind or action, or a step is to be skipped at an alarm that comes after it.

    >>> resolve_actions({"non_finite": ["skip", "checkpoint"], "everywhere": ReduceLR(0.3)})["everywhere"]
    (ReduceLR(factor=0.3, times=3),)
    >>> resolve_actions({"nonfinite": "skip"})
    Traceback (most recent call last):
    ...
    ValueError: kind='nonfinite' is unknown. Choose one of 'non_finite', 'spike', ...; did you mean 'non_finite'?
    """
    if not isinstance(actions, Mapping):
        raise wrong_type("actions", actions, "a dict of kinds of alarm, such as {'non_finite': 'skip'}")
    chosen: dict[str, tuple[Action, ...]] = {}
    for kind, asked in actions.items():
        check_choice("kind", kind, list(KINDS))
        listed = [asked] if isinstance(asked, str | Action) else asked
        if not isinstance(listed, Sequence):
            raise wrong_type(f"actions[{kind!r}]", asked, "an action's name, an object of stabnorm.actions, or a list")
        chosen[kind] = tuple(made for one in listed if (made := _action(kind, one)) is not None)
    return chosen


def _action(kind: str, asked: Any) -> Action | None:
    if isinstance(asked, str):
        check_choice(f"actions[{kind!r}]", asked, [LOG, *ACTIONS], ", or an object of stabnorm.actions")
        if asked == LOG:
            return None
        asked = ACTIONS[asked]()
    if not isinstance(asked, Action):
        raise wrong_type(f"actions[{kind!r}]", asked, "an action's name, an object of stabnorm.actions, or a list")
    if asked.before_step and kind not in BEFORE_STEP:
        raise ValueError(
            f"actions[{kind!r}]={shown(asked.name)} comes too late: a step is left out before the optimizer steps, and "
            f"an alarm of this kind is raised afterwards. Give it for {', '.join(map(repr, BEFORE_STEP))}"
        )
    return asked


def kind_of(onset: Onset) -> str:
    """Return the kind of an onset, one of `KINDS`."""
    if onset.statistic == "nonfinite":
        return NON_FINITE
    return {"nonfinite": NON_FINITE, "bound": "bound"}.get(onset.kind, onset.scope.replace(" ", "_"))


class Actions:
    """Does at each alarm what was asked for its kind, in any training loop; the same on all ranks.

    Call `begin_step` before the first forward of a step, `skips` between the backward and the optimizer's step, and
    `end_step` after `monitor.step`. Without an action that is decided before the step, nothing is read from the device
    there. Other actions are done at the flush that brings the alarm, so up to ``flush_every`` steps late.

    Args:
        training: what the actions may change.
        actions: kind of alarm -> an action's name, an object of `stabnorm.actions`, or a list of them. The kinds are
            "non_finite" and "spike", which are known before the step, and those of `stabnorm.monitor.Onset`: "bound",
            "one_layer", "from_here_on", "everywhere" and "training"; "any" stands for all of them.

    Attributes:
        done: what was done, in order.
        verdict: what is known of the open step.

    Raises:
        TypeError: an argument has another type.
        ValueError: an unknown kind or action, or the training lacks what an action needs.

    >>> import stabnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> with stabnorm.StabilityMonitor(model) as monitor:
    ...     actions = Actions(Training(model, monitor, [optimizer]), {"non_finite": "skip"})
    ...     for batch in torch.randn(4, 4), torch.full((4, 4), torch.nan):
    ...         actions.begin_step()
    ...         loss = model(batch).square().mean()
    ...         loss.backward()
    ...         if not actions.skips(optimizer, loss=loss):
    ...             optimizer.step()
    ...         monitor.step(loss=loss)
    ...         actions.end_step()
    ...         optimizer.zero_grad()
    >>> actions.done[0].action, actions.done[0].why.layer
    ('skip', '1')
    >>> model[0].weight.isfinite().all()
    tensor(True)
    """

    def __init__(self, training: Training, actions: Mapping[str, Asked]) -> None:
        if not isinstance(training, Training):
            raise wrong_type("training", training, "a stabnorm.actions.Training")
        self.training, self._table = training, resolve_actions(actions)
        distinct = dict.fromkeys(action for of_kind in self._table.values() for action in of_kind)
        self._workers: dict[Action, Worker] = {action: action.start(training) for action in distinct}
        self._times = dict.fromkeys(distinct, 0)
        self._last = dict[Action, int]()  # when it was done last
        self._spikes = bool(self._table.get(SPIKE))  # whether they are looked for
        self._judges = self._spikes or any(action.before_step for action in distinct)
        self._followed = self._onsets()
        self._loss: Tensor | None = None  # the largest one of the micro-batches
        self.verdict = Verdict()
        self._known = set[int]()  # the steps that were known to be bad before their alert
        self.done: list[Done] = []

    def begin_step(self) -> None:
        """Begin a step, before its first forward."""
        self._loss, self.verdict = None, Verdict()
        for worker in self._workers.values():
            worker.begin_step()

    def see_loss(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch, or of another part of the step; it is not read."""
        if self._judges:
            value = loss.detach().float().max()
            if self.training.scaler is not None:  # which looks for what is infinite
                value = torch.where(value.isinf(), 0, value)
            self._loss = value if self._loss is None else torch.maximum(self._loss, value.to(self._loss))

    def skips(
        self,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        *,
        loss: Tensor | None = None,
        gradient_norm: Tensor | float | None = None,
    ) -> bool:
        """Say whether the step is left out; its gradients are gone then. Call it after the backward, on all ranks.

        A gradient scaler must have unscaled the gradients; it is to be used further as if nothing had happened. What it
        finds in the gradients is its own matter.

        Args:
            optimizer: the optimizer that would step. Default: all of the training.
            loss: the step's loss. Default: that of `see_loss`, if it was called.
            gradient_norm: the norm of the gradients before they were clipped. Default: it is computed if it is needed.

        Raises:
            StabNormError: more steps were skipped than an action allows.
        """
        if self._judges:
            if loss is not None:
                self.see_loss(loss)
            verdict = self.verdict
            if verdict.kind != SPIKE:  # of a step with a spike, no optimizer steps any more
                verdict = self.training.monitor.verdict_before_step(
                    optimizer or self.training.optimizers,
                    loss=self._loss,
                    gradient_norm=gradient_norm,
                    scaled=self.training.scaler is not None,
                    spikes=self._spikes,
                )
            if verdict.bad:
                first, self.verdict = not self.verdict.bad, verdict
                if self._before_step(verdict, first=first):
                    return True
        for worker in self._workers.values():
            worker.before_step()
        return False

    def _before_step(self, verdict: Verdict, *, first: bool) -> bool:
        """Do what is done before a bad step, and return whether that leaves it out."""
        why = Why(verdict.kind, self.training.monitor.steps_done, verdict.layer, verdict.reason)
        actions = [action for action in self._of(verdict.kind) if action.before_step]
        if verdict.kind == NON_FINITE:
            self._known.add(why.step)
        for action in actions:
            words = self._workers[action].act(why)
            if first:
                self._record(action, why, words)
        return bool(actions)

    def end_step(self) -> None:
        """End a step, after `monitor.step`: do what its alarms ask for.

        Raises:
            StabNormError: the budget of an action is used up.
        """
        monitor = self.training.monitor
        if self._workers and monitor.flushed:
            monitor.flush()  # what a GPU has sent arrives now, and not one flush later
        raised = dict[str, Why]()
        if self.verdict.bad:
            verdict = self.verdict
            raised[verdict.kind] = Why(verdict.kind, monitor.steps_done - 1, verdict.layer, verdict.reason)
        onsets = self._onsets()
        for number, (kind, _) in onsets.items():
            onset = monitor.onsets[number]
            known = kind == NON_FINITE and bool(self._known & set(range(onset.step, onset.last_step + 1)))
            if self._followed.get(number) != onsets[number] and not known:
                raised.setdefault(kind, Why(kind, onset.last_step, onset.layer, onset.sentence.rstrip(".")))
        self._followed = onsets
        for worker in self._workers.values():
            worker.end_step(calm=not raised)
        for why in raised.values():
            for action in self._of(why.kind):
                if not action.before_step:
                    self._do(action, why)

    def _onsets(self) -> dict[int, tuple[str, int]]:
        """Return kind and last step of each onset so far; one that grows may become one of another kind."""
        return {number: (kind_of(onset), onset.last_step) for number, onset in enumerate(self.training.monitor.onsets)}

    def _of(self, kind: str) -> list[Action]:
        return list(dict.fromkeys((*self._table.get(kind, ()), *self._table.get("any", ()))))

    def _do(self, action: Action, why: Why) -> None:
        now = self.training.monitor.steps_done
        if now - self._last.get(action, -action.rest) < action.rest:
            return
        self._last[action] = now
        self._times[action] += 1
        if action.times is not None and self._times[action] > action.times:
            if self._times[action] == action.times + 1:
                self._record(action, why, f"it is not done any more, because it was done {action.times} times")
            return
        try:
            words = self._workers[action].act(why)
        except OutOfBudget:
            raise
        except Exception as error:  # a full disk, for example
            words = f"it failed, and the training goes on: {cause(error)}"
        self._record(action, why, words)

    def _record(self, action: Action, why: Why, words: str) -> None:
        monitor = self.training.monitor
        self.done.append(Done(action.name, why, words))
        if not monitor.speaks:
            return
        say("stabnorm, step %s: %s, because of %s: %s", why.step, words, why.kind, why.reason)
        data = {"action": action.name, "done": words, **why._asdict()}
        monitor.outputs.write_event(monitor.records, "action", why.step, data)

    def state_dict(self) -> dict[str, Any]:
        """Return what the actions have counted and learnt, as tensors and plain containers."""
        workers = self._workers.items()
        return {repr(action): {"times": self._times[action], "worker": w.state_dict()} for action, w in workers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; an action that it does not have starts afresh."""
        for action, worker in self._workers.items():
            if repr(action) in state:
                self._times[action] = int(state[repr(action)]["times"])
                worker.load_state_dict(state[repr(action)]["worker"])
