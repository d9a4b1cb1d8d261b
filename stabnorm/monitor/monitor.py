"""`StabilityMonitor`: measure the input of every normalization layer of a model at every step, in any training loop."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabnorm._checks import (
    check_count,
    check_flag,
    check_function,
    check_has_numbers,
    check_instance,
    check_model,
    check_number,
    check_scalar,
    wrong_type,
)
from stabnorm._log import logger
from stabnorm._models.masks import ask_about_masks
from stabnorm._models.ranks import gather_in_group
from stabnorm._models.wrappers import unwrapped
from stabnorm._states import check_state, load_whole
from stabnorm.companions.companion import Companion, StepLoss
from stabnorm.companions.names import resolve_companions
from stabnorm.errors import StabNormError
from stabnorm.monitor.accumulators import Accumulators
from stabnorm.monitor.alerts import Alert
from stabnorm.monitor.budget import Budget
from stabnorm.monitor.companion_tracks import CompanionTracks
from stabnorm.monitor.cost import Cost, Stopwatch
from stabnorm.monitor.details import Details, is_detailed, optimizers_of, weight_decay_of
from stabnorm.monitor.detect import MakeDetector, RobustDetector, watched_together
from stabnorm.monitor.gradient_norm import norm_of_gradients
from stabnorm.monitor.loss_scales import Scale, unscaled
from stabnorm.monitor.measure import Measurement
from stabnorm.monitor.observe import Observer
from stabnorm.monitor.onsets import Onset
from stabnorm.monitor.outputs import Outputs, say
from stabnorm.monitor.plot import plot_track
from stabnorm.monitor.ranks import (
    group_of,
    is_first_rank,
    merge_over_ranks,
    merging_ranks,
    of_first_rank,
    refuse_other_layers,
)
from stabnorm.monitor.record import Block, RecordWriter
from stabnorm.monitor.reporter import Reporter
from stabnorm.monitor.rows import BESIDE_NORMS
from stabnorm.monitor.saved_past import unpadded
from stabnorm.monitor.scalars import (
    SCALARS,
    check_scalars,
    last_scale,
    on_device,
    scalars_of,
    with_all_scalars,
)
from stabnorm.monitor.spikes import Spikes
from stabnorm.monitor.statistics import Statistic, resolve
from stabnorm.monitor.track import Track
from stabnorm.monitor.training_series import TrainingSeries
from stabnorm.monitor.trial import try_own_statistics
from stabnorm.monitor.verdict import SPIKE, Seen, Verdict, gradients_of, verdict_of
from stabnorm.monitor.watched_norms import WatchedNorms
from stabnorm.norms import NormLayer
from stabnorm.ops.dispatch import admit, look_again
from stabnorm.statistic import by_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_NEW_IN_STATE = {"companions", "onsets", "marks", "training", "budget", "spikes"}  # older checkpoints do not have these


def check_options(*, flush_every: Any, gradients: Any, fused: Any, detector: Any, on_alert: Any, budget: Any) -> None:
    """Check what `StabilityMonitor` and `StabilityCallback` both take, before there is a model.

    Raises:
        TypeError: an argument has another type.
        ValueError: `flush_every` is below 1, or `budget` is no share.
    """
    if budget is not None:
        check_number("budget", budget, above=0, most=1, hint=", a share of the step: 0.02 is 2 %")
    check_count("flush_every", flush_every, hint=": the steps from flush to flush")
    check_flag("gradients", gradients)
    check_flag("fused", fused)
    if detector is not None:
        check_function("detector", detector, "statistics", "rows", "fading")
        if isinstance(detector, type) and not hasattr(detector, "update"):
            raise wrong_type("detector", detector, "a class of detectors, see stabnorm.monitor.detect.Detector")
    if on_alert is not None:
        check_function("on_alert", on_alert, "alert")


class StabilityMonitor:
    """Measures at every norm of a model how mean and variance fluctuate, and how large the outliers are.

    Use it as a context manager around a training loop, or call `attach` and `detach`. Forwards count while ``model`` is
    in training mode. Everything between two calls of `step` is one step, whatever the number of micro-batches.

    Processes that train together (DDP, FSDP2) each have a monitor and all call `step`. Their measurements are merged,
    with one collective per step, so all processes hold the statistics of the whole batch. The first process writes the
    record.

    Args:
        model: the model; its norms are found by `find_norms`.
        preset: "economy", "standard", "full", or a list of statistics: names, see `stabnorm.monitor.statistics`, and
            objects of the class `Statistic`, which may be your own. Default: "standard".
        flush_every: number of steps between two copies to the host; each copy has every step of every layer. Default:
            50.
        include: a regular expression, or a list of them, that a layer's name must match. Default: all.
        exclude: the same for layers to leave out. Default: none.
        gradients: False leaves out the gradient statistics and their hooks. Default: True.
        sync: True merges over all processes of `torch.distributed` if it is initialised. False measures this process
            alone. A process group merges over its processes, for models whose layers are spread over processes.
            Default: True.
        companions: what to watch beside the norms, by name ("attention", "weights", "embedding", "output",
            "curvature", "switch") or as objects of `stabnorm.companions`. Default: nothing.
        fused: compute torch's own LayerNorm and RMSNorm and their statistics in one pass, in eager mode, if there is a
            kernel for both, see `stabnorm.ops.backends`. Output and gradients are then equal up to rounding, but not
            bit for bit. Default: False, and the monitor changes nothing.
        detector: class or function that makes the detectors, which raise the alerts: one for the norms and one for each
            companion; see `stabnorm.monitor.detect.Detector`. Default: `RobustDetector`.
        budget: the share of a step that watching may take, such as 0.02. What is costly and raises no alert, such as
            the affine residual and, in "full", medians, is then measured at every k-th step, with the least k that
            fits, and is NaN at the others. Default: none, and every statistic is measured at every step.
        on_alert: a function that is called with each `Alert`, at the flush that brings it, on the first rank. If it
            raises an error, this is logged once and the training goes on. Default: none.

    Raises:
        ValueError: the model has no norm to watch, a statistic or preset is unknown, `flush_every` is below 1, a
            statistic of your own does not return one number per layer, or a companion finds nothing to watch.
        TypeError: a statistic is neither a name nor a `Statistic`, or an argument has another type.

    Shape: `history()` returns ``[steps, layers]`` for every statistic, in float32. `companions[name].history()` returns
    the same for the rows of the companion, such as heads or matrices.

    The functions in `listeners` are called at the end of each step with the step's number and all its statistics,
    ``[layers, statistics]`` in the order of `layers` and `statistics`. This tensor is on the device, so reading a value
    waits for the device.

    >>> import torch, stabnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> with stabnorm.StabilityMonitor(model, gradients=False) as monitor:
    ...     for _ in range(3):
    ...         _ = model(torch.randn(5, 4))
    ...         monitor.step()
    >>> monitor.layers, monitor.history()["token_std_mean"].shape
    (('1',), torch.Size([3, 1]))
    """

    def __init__(
        self,
        model: nn.Module,
        preset: str | Sequence[str | Statistic] = "standard",
        *,
        flush_every: int = 50,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        gradients: bool = True,
        sync: "bool | ProcessGroup" = True,
        companions: Sequence[str | Companion] = (),
        fused: bool = False,
        detector: MakeDetector | None = None,
        on_alert: Callable[[Alert], object] | None = None,
        budget: float | None = None,
    ) -> None:
        check_model("model", model)
        check_options(
            flush_every=flush_every,
            gradients=gradients,
            fused=fused,
            detector=detector,
            on_alert=on_alert,
            budget=budget,
        )
        if not hasattr(sync, "rank"):  # a process group has one
            check_flag("sync", sync)
        chosen = [s for s in resolve(preset) if gradients or "gradients" not in s.needs_all]
        if not chosen:
            raise ValueError(f"preset {preset!r} holds gradient statistics only, and gradients=False leaves them out")
        model = unwrapped(model)
        self._watched = WatchedNorms(model, include, exclude)
        norms = self._watched.norms
        self.statistics = tuple(chosen)
        self.layers = tuple(norm.name for norm in norms)
        self.flush_every = flush_every
        self.listeners: list[Callable[[int, Tensor], None]] = []
        self.steps_done = 0
        self.sync = sync
        self.has_running_statistics = np.array([norm.running_mean is not None for norm in norms])
        make_detector = RobustDetector if detector is None else detector
        fading = [norm.name for norm in norms if hasattr(norm.module, "lam")]
        self._track = Track(
            self.layers, chosen, make_detector(self.statistics, self.layers, fading), flush_every, self.flush,
            beside=BESIDE_NORMS,
        )  # fmt: skip
        beside = resolve_companions(companions)
        self.companions = CompanionTracks(beside, model, make_detector, flush_every, self.flush)
        self._norms, self._model = norms, model
        needs = frozenset[str]().union(*(s.needs_all for s in chosen), *(companion.needs for companion in beside))
        self._accumulators = Accumulators(
            model, norms, tokens="tokens" in needs, normalized="normalized" in needs, merged=bool(sync), fused=fused
        )
        details = Details(self._accumulators, needs) if is_detailed(chosen) else None
        self._observer = Observer(self._accumulators, gradients="gradients" in needs, details=details)
        self._measurement = Measurement(self._accumulators, chosen, details, self._track.layout)
        try_own_statistics(self._measurement, self._observer.device)
        self._observer.discard()
        self._budget = Budget(budget, functools.partial(of_first_rank, sync))
        self._agreed = False  # whether it was checked that all ranks watch the same layers
        self._stopwatch = Stopwatch()
        self._reporter = Reporter(self.layers, on_alert)
        self._spikes = Spikes(self.layers)
        self._training = TrainingSeries() if detector is None else None  # the loss and the norm of the gradient

    def __repr__(self) -> str:
        state = "hooks on" if self._observer.attached else "hooks off"
        beside = "".join(f", {name}: {len(track.rows)} rows" for name, track in self.companions.items())
        return (
            f"StabilityMonitor({len(self.layers)} layers, {len(self.statistics)} statistics{beside}, "
            f"flush_every={self.flush_every}: {self.steps_done} steps done, {len(self.alerts)} alerts, {state})"
        )

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.detach()
            self.flush()
        else:  # which an error of ours must not replace
            self.outputs.attempt("the hooks cannot be removed", self.detach)
            self.outputs.attempt("the last steps cannot be flushed", self.flush)

    def attach(self) -> None:
        """Register the hooks; a second call changes nothing. If one cannot be registered, they all come off.

        Raises:
            StabNormError: the model is on the meta device, or another rank watches other layers.
        """
        if self._observer.device.type == "meta":
            check_has_numbers(self._accumulators.model, "to watch")
        self._agree()
        self._observer.detach()
        with torch.inference_mode(False):  # what is allocated here changes later, outside of that mode
            self._observer.attach()
            try:
                self.companions.attach()
                admit(self._observer.device)
            except BaseException:
                self.detach()
                raise
            self._accumulators.dear = self._budget.is_due(self.steps_done)
            self._measurement.states(self._observer.device)  # now, because that would stall a GPU in the first step

    def detach(self) -> None:
        """Remove all hooks; the history stays readable."""
        self._observer.detach()
        self.companions.detach()

    def discard(self) -> None:
        """Discard what was gathered since the last step, for forwards that were not part of the training."""
        self._observer.discard()
        self.companions.discard()

    def count_in_eval(self) -> None:
        """Count forwards in eval mode, too, to measure a model that is not trained."""
        self._accumulators.in_eval = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context no forward counts, for example one of a validation in the middle of an accumulation.

        What the open step has gathered is kept. A validation in eval mode does not count anyway.

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> with StabilityMonitor(model, gradients=False) as monitor:
        ...     _ = model(torch.randn(5, 4))
        ...     with monitor.paused():  # a validation with dropout
        ...         _ = model(torch.randn(7, 4))
        ...     monitor.step()
        >>> monitor.history()["tokens"]
        tensor([[5.]])
        """
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> None:
        """Count no forward from now on, see `paused`."""
        self._set_paused(True)

    def resume(self) -> None:
        """Count forwards again."""
        self._set_paused(False)

    def _set_paused(self, paused: bool) -> None:
        self._accumulators.paused = paused
        for track in self.companions.values():
            track.watch.paused = paused

    # -- a step --------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # the next step changes what this one keeps, perhaps outside of that mode
    @torch.no_grad()
    def step(
        self,
        *,
        loss: Tensor | float | None = None,
        learning_rate: Tensor | float | None = None,
        gradient_norm: Tensor | float | None = None,
        grad_scale: Scale | Mapping[Optimizer, Scale] | None = None,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        closure: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """End an optimizer step: call it after the last backward and before the next forward.

        Args:
            loss: the step's loss, for the record. A tensor is not read before the flush. Default: NaN in the record.
            learning_rate: the step's learning rate, for the record. Default: NaN in the record.
            gradient_norm: the norm of all gradients before they were clipped, as `torch.nn.utils.clip_grad_norm_`
                returns it, without the loss scale. It is watched, as the loss is. Default: NaN in the record.
            grad_scale: the factor by which gradients were scaled, ``scaler.get_scale()`` or the scaler's own tensor.
                Call `step` before ``scaler.update()``. With several optimizers between whose steps the scale is
                updated, give a mapping of the factor at the step of each optimizer. Default: 1.
            optimizer: the optimizer that has just stepped, or several, for the statistics of its moments in "full".
                Call `step` before ``zero_grad()``. Default: none, and these statistics are NaN.
            closure: computes the loss of this step's batch, or of its last micro-batch, once more; it calls no
                ``backward()``. The companion "curvature" needs it, at some steps. Default: none.

        Raises:
            StabNormError: the hooks are not registered, or another rank watches other layers.
            ValueError: loss or learning rate is not a single number, or `grad_scale` is not above 0.
            TypeError: `optimizer` is not an optimizer, or another argument is no number.
        """
        if not self._observer.attached:
            raise StabNormError("step() on a monitor whose hooks are off; use `with monitor:` or call attach() first")
        given = {"loss": loss, "learning_rate": learning_rate, "gradient_norm": gradient_norm}
        check_scalars(given, grad_scale)
        if closure is not None:
            check_function("closure", closure)
        optimizers = optimizers_of(optimizer)
        start = self._stopwatch.begin_step(self._hook_seconds)
        self._agree()
        device = self._observer.device
        scale = last_scale(grad_scale)
        every = None if self._budget.share is None else self._budget.every
        given |= {"loss_scale": scale, "weight_decay": weight_decay_of(optimizers), "measured_every": every}
        given["nonfinite"] = None if loss is None else 0.0  # which says that there is a loss
        states = self._measurement.states(device)
        gathered = self._measurement.gathered(states, device)
        if grad_scale is not None:
            gathered = unscaled(gathered, self._accumulators.bands, self._model, grad_scale)
        if merging_ranks(self.sync) > 1:
            gathered, merged_loss = merge_over_ranks(self.sync, gathered, on_device(loss, device))
            given["loss"] = None if loss is None else merged_loss
        row, norms = self._measurement.rows(states, gathered, optimizers)
        self._track.add(row, *scalars_of(given, device))
        self.companions.step(self.layers, norms, StepLoss(closure, scale, self.sync))
        self._observer.discard()
        for listen in self.listeners:
            listen(self.steps_done, self._track.layout.statistics_of(row))
        self.steps_done += 1
        self._stopwatch.end_step(start, self._hook_seconds)
        self._budget.note(self._hook_seconds + self._stopwatch.steps)
        self._budget.decide(self.steps_done, self._stopwatch)
        self._accumulators.dear = self._budget.is_due(self.steps_done)
        if self._track.waiting == self.flush_every:
            self._send()

    @torch.no_grad()
    def verdict_before_step(
        self,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        *,
        loss: Tensor | float | None = None,
        gradient_norm: Tensor | float | None = None,
        scaled: bool = False,
        spikes: bool = False,
    ) -> Verdict:
        """Say whether the step that is open may be applied: call it after the backward and before the optimizer.

        A step is bad if the input of a norm, the loss or a gradient has a NaN or an infinity, or, with `spikes`, if one
        of them is far above its past, see `stabnorm.monitor.spikes.Spikes`. That is so if it is on any rank; all ranks
        get the same answer and must all ask. This waits for the device once, and for the other ranks. `step` is to be
        called afterwards all the same.

        Args:
            optimizer: the optimizer whose gradients are looked at, or several. Default: none.
            loss: the step's loss. Default: it is not looked at.
            gradient_norm: the norm of the gradients before they were clipped. Default: it is computed, for `spikes`.
            scaled: whether a gradient scaler looks for gradients that are not finite, so that this must not. Default:
                False.
            spikes: whether to look for spikes, too. Default: False.

        Raises:
            TypeError: `optimizer` is no optimizer, or the loss is no number.

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> with StabilityMonitor(model) as monitor:
        ...     model(torch.full((2, 4), torch.nan)).sum().backward()
        ...     verdict = monitor.verdict_before_step()
        >>> verdict.kind, verdict.layer
        ('non_finite', '1')
        """
        if loss is not None:
            check_scalar("loss", loss)
        optimizers = optimizers_of(optimizer)
        if spikes and gradient_norm is None and optimizers:
            gradient_norm = norm_of_gradients(optimizers)
        gradients = () if scaled else gradients_of(optimizers)
        largest = self._accumulators.largest(self._observer.device)
        seen = torch.stack(Seen.of(loss, gradients, gradient_norm if spikes else None, largest))
        everyone = seen[None]
        if merging_ranks(self.sync) > 1:
            self._agree()
            everyone = gather_in_group(seen, group_of(self.sync))
        (own_flags, own), (flags, sizes) = torch.stack([seen, everyone.amax(0)]).tolist()
        verdict = verdict_of([flag > 0 for flag in flags], self.layers, here=max(own_flags) > 0)
        if verdict.bad or not spikes:
            return verdict
        spike = self._spikes.judge(optimizers, sizes)
        if spike is None:
            return verdict
        if self._spikes.lasts:
            if self._reporter.speaks:
                what = "stabnorm, step %d: so many spikes in a row are a new level, which is accepted: %s"
                say(what, self.steps_done, spike.reason)
            self._spikes.forget()
            return verdict
        return Verdict(SPIKE, spike.layer, spike.reason, own[spike.place] >= sizes[spike.place])

    def announce_change(self, reason: str) -> None:
        """Say that something was changed on purpose before the next step, such as batch size, data or a schedule.

        The detectors learn again what is usual, within 64 steps; until then only fixed bounds and what is not finite
        are watched. The reason is in the record, and an onset soon after names it.

        Args:
            reason: what was changed, in words.

        Raises:
            TypeError: the reason is no text.
        """
        check_instance("reason", reason, str, "a text that says what was changed")
        self._send()
        self._receive()  # alerts of the steps before belong to the past before
        for detector in self._detectors:
            forget = getattr(detector, "forget", None)
            if forget is not None:
                forget()
        self._reporter.announce(self.steps_done, reason)

    @property
    def _detectors(self) -> list[Any]:
        own: list[Any] = [self._spikes] if self._training is None else [self._spikes, self._training]
        return [track.detector for track in self._tracks] + own

    def _agree(self) -> None:
        """Check once that all ranks watch the same layers and statistics, because merging relies on it."""
        if not self._agreed and merging_ranks(self.sync) > 1:
            names = [*self.layers, *(statistic.name for statistic in self.statistics)]
            refuse_other_layers(self.sync, [*names, *(["a budget"] if self._budget.share is not None else [])])
            self._agreed, self._reporter.speaks = True, is_first_rank(self.sync)

    # -- results -------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Copy all gathered steps to the host, run the detectors, and write the record."""
        self._send()
        self._receive()
        self.outputs.retry()

    def history(self) -> dict[str, Tensor]:
        """Flush, and return every statistic of every step, ``[steps, layers]``.

        A value is NaN if the layer did not run, or if the statistic needs earlier steps that do not exist yet. The
        entry "tokens" has the number of valid tokens of each layer. Memory is bounded: of a very long run the last 64
        MiB are kept, and `history_steps` says which steps these are.
        """
        return self._track.history()

    def history_steps(self) -> Tensor:
        """Return the optimizer steps of the rows of `history()`, counted from 0."""
        return self._track.history_steps()

    def history_so_far(self, companion: str = "") -> tuple[Tensor, dict[str, Tensor]]:
        """Return the steps and what `history` would return, without a flush; this waits for the device.

        Args:
            companion: whose history it is. Default: that of the norms.
        """
        return (self.companions[companion] if companion else self._track).so_far(self.steps_done)

    def plot(self, statistic: str = "", *, companion: str = "", colour: str = "times", ax: Any = None) -> Any:
        """Flush, and draw a statistic of all layers over the steps, as a figure that a notebook shows.

        Args:
            statistic: its name. Default: ``token_std_mean`` if it is watched, else the first one.
            companion: whose rows are drawn, such as "attention". Default: the norms.
            colour: "times" divides each value by what was usual for its layer before (white: usual, red: twice as much
                and more, blue: half and less), "sigmas" says how many robust standard deviations it is off, "value" is
                the value itself. Default: "times".
            ax: matplotlib axes to draw on. Default: a new figure.

        Raises:
            ImportError: matplotlib is missing; it is the extra ``stabnorm[plot]``.
            ValueError: an unknown statistic, companion or colour, or no step yet.
        """
        watched: Any = by_name(companion, self.companions, Track, "companion") if companion else self._track
        chosen = watched.statistics if companion else self.statistics
        rows = watched.rows if companion else self.layers
        return plot_track(watched, rows, chosen, self.alerts, statistic, colour, ax)

    @property
    def alerts(self) -> list[Alert]:
        """The alerts so far, in the order of the flushes that brought them."""
        return self._reporter.alerts

    @property
    def records(self) -> list[RecordWriter]:
        """What gets every block and every event; add writers to this list."""
        return self._reporter.records

    @records.setter
    def records(self, writers: list[RecordWriter]) -> None:
        self._reporter.records = writers

    @property
    def outputs(self) -> Outputs:
        """Where everything is called that writes, draws or logs, see `Outputs`."""
        return self._reporter.outputs

    @property
    def onsets(self) -> list[Onset]:
        """The alerts so far, grouped: what moved together, where it began, and what to do; see `Onset`."""
        return self._reporter.onsets

    @property
    def steps_watched(self) -> int:
        """The number of steps that the detector has seen, those before a resume included."""
        return int(getattr(self._track.detector, "steps", self.steps_done))

    @property
    def compared(self) -> bool:
        """Whether the detector has begun to compare layers with their usual range; one of your own always has."""
        return bool(getattr(self._track.detector, "compared", True))

    @property
    def norms(self) -> tuple[NormLayer, ...]:
        """The norms that are watched, in the order of `layers`."""
        return tuple(self._norms)

    @property
    def model(self) -> nn.Module:
        """The model that is watched, without wrappers such as DDP."""
        return self._model

    def mute(self) -> None:
        """Let this monitor neither warn nor write, because another one does."""
        self._reporter.speaks = False

    @property
    def speaks(self) -> bool:
        """Whether this process writes the record and warns, because it is the first of those that merge."""
        return self._reporter.speaks

    @property
    def flushed(self) -> bool:
        """Whether no step waits for a flush, as right after one."""
        return not self._track.waiting

    @property
    def worst_score(self) -> float:
        """The highest score that the detectors gave in the last flush, 0 while they learn; an alert has 6 or more."""
        return max(float(getattr(track.detector, "worst_score", 0.0)) for track in self._tracks)

    @property
    def fading(self) -> npt.NDArray[np.bool_]:
        """Which layers are being switched to another norm, or have been; this reads their lam from the device."""
        lams = [getattr(norm.module, "lam", None) for norm in self._norms]
        return np.array([lam is not None and float(lam) < 1 for lam in lams])

    @property
    def _tracks(self) -> tuple[Track, ...]:
        return self._track, *self.companions.values()

    def _send(self) -> None:
        """Start the copy to the host; on a GPU it is asynchronous."""
        look_again()
        ask_about_masks()
        if not self._track.waiting:
            return
        self._receive()
        start = time.perf_counter()
        if self._observer.modules_changed() and self.speaks:
            self._watched.tell_changes()
        for track in self._tracks:
            track.send(self.steps_done)
        self._stopwatch.flushes += time.perf_counter() - start
        if self._observer.device.type == "cpu":
            self._receive()

    def _receive(self) -> None:
        """Finish the copy, and update history, alerts and record."""
        start = time.perf_counter()
        norms: Block | None = None
        watched_together(track.detector for track in self._tracks)
        for track in self._tracks:
            arrived = track.receive()
            if arrived is not None:
                block, alerts = arrived
                norms = norms or block  # their track is the first
                self._reporter.write_block(block)
                self._reporter.take(alerts, track.take_departures())
        if norms is not None and self._training is not None:
            series = {name: norms.series[name] for name in ("loss", "gradient_norm") if name in norms.series}
            seen = (norms.first_step, series, self._track.not_finite)
            alerts = self.outputs.attempt("the loss is not watched", self._training.update, *seen) or []
            self._reporter.take(alerts, self._training.take_departures())
        if norms is not None:
            rows = {name: len(track.rows) for name, track in self.companions.items()}
            self._reporter.group(norms, rows, self.steps_watched)
        self._stopwatch.flushes += time.perf_counter() - start

    @property
    def _hook_seconds(self) -> float:
        return self._accumulators.seconds + self.companions.hook_seconds

    @property
    def seconds(self) -> float:
        """Time spent in hooks, steps and flushes so far, on the host."""
        return self._hook_seconds + self._stopwatch.steps + self._stopwatch.flushes

    @property
    def cost(self) -> Cost:
        """What monitoring cost so far, measured on the host."""
        return self._stopwatch.cost(self._hook_seconds)

    # -- resume --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return baselines, counters, and the rows since the last flush; earlier steps are only in the record.

        The state has tensors and plain containers only. This neither flushes nor writes anything.
        """
        rows = self._track.no_rows()
        rows, marks, scalars = self._track.unflushed() or (rows, rows, rows.new_empty(0, len(SCALARS)))
        return {
            "version": 3,
            "layers": list(self.layers),
            "channels": [norm.num_features for norm in self._norms],
            "statistics": [statistic.name for statistic in self.statistics],
            "steps_done": self.steps_done,
            "past": self._measurement.state_dict(),
            "detector": self._track.detector.state_dict(),
            **self._reporter.state_dict(),
            "rows": rows,
            "marks": marks,
            "scalars": scalars,
            "training": None if self._training is None else self._training.state_dict(),
            "spikes": self._spikes.state_dict(),
            "companions": self.companions.state_dict(),
            "budget": self._budget.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; `history()` then begins with the rows that were not flushed when it was saved.

        The step counter is always restored. Everything else is restored if layers and statistics are the same; if not,
        it starts again, with a warning. Steps that a killed run had written after the state was saved come to the
        record a second time; the last version counts.

        Raises:
            TypeError: the state is no dict.
            ValueError: the state is not that of a monitor; nothing is loaded then.
        """
        check_state(state, "StabilityMonitor", self.state_dict().keys() - _NEW_IN_STATE)
        self.flush()
        load_whole(self, self._load, state)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.steps_done = int(state["steps_done"])
        self._track.restore(self.steps_done)
        self._reporter.load_state_dict(state)
        self._budget.load_state_dict(state.get("budget", {}))
        self._accumulators.dear = self._budget.is_due(self.steps_done)
        self.companions.load_state_dict(state.get("companions", {}), self.steps_done)
        own = self.state_dict()
        if state["version"] not in (2, 3) or any(state[p] != own[p] for p in ("layers", "channels", "statistics")):
            logger.warning(
                "the checkpoint watched other layers or statistics, or is of another version: baselines start afresh "
                "at this step"
            )
            return
        known = self._load_past(state) and "marks" in state
        marks = state["marks"].cpu() if known else None
        scalars = with_all_scalars(state["scalars"].cpu())
        self._track.restore(self.steps_done, state["rows"].cpu(), marks, scalars)

    def load_baselines(self, state: dict[str, Any]) -> None:
        """Take over what was usual for each layer in an earlier state of this monitor.

        Steps, history and alerts go on, as in a training that goes back to an earlier state and counts its steps on.
        """
        check_state(state, "StabilityMonitor", self.state_dict().keys() - _NEW_IN_STATE)
        self.flush()
        self._load_past(state)
        self.companions.load_baselines(state.get("companions", {}))

    def _load_past(self, state: Mapping[str, Any]) -> bool:
        """Load what was usual, and return whether the detector could read its part."""
        if state["past"] is not None:
            past = unpadded(state["past"], state["channels"]) if state["version"] == 2 else state["past"]
            self._measurement.load_past(past, self._observer.device)
        if self._training is not None and state.get("training") is not None:
            self._training.load_state_dict(state["training"])
        if "spikes" in state:
            self._spikes.load_state_dict(state["spikes"])
        return self._track.load_detector(state["detector"])
