"""`StabilityCallback`: measure the input of every normalization layer, with a Lightning Trainer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from stabnorm._checks import check_count
from stabnorm._models.names import NameFilter
from stabnorm._states import check_state
from stabnorm.actions.actions import Actions, resolve_actions
from stabnorm.callbacks._actions import actions_of
from stabnorm.callbacks._changes import Feed
from stabnorm.callbacks._closing import ClosingReport
from stabnorm.callbacks._lightning import Callback
from stabnorm.callbacks._live import LiveReport
from stabnorm.callbacks._masks import BatchMask
from stabnorm.callbacks._open_step import OpenStep
from stabnorm.callbacks._optimizers import learning_rate
from stabnorm.callbacks._outputs import (
    alert_writers,
    begin_run,
    headline_writers,
    output_directory,
    record_writers,
)
from stabnorm.callbacks._recorder import BatchIndices, recorder_of
from stabnorm.callbacks._terminal import show_messages
from stabnorm.callbacks._trainer import (
    check_loss_again,
    described,
    logged_steps,
    loss_again,
    loss_scale,
    state_to_pickle,
)
from stabnorm.companions.companion import Companion
from stabnorm.companions.names import resolve_companions
from stabnorm.monitor.alerts import Alert
from stabnorm.monitor.detect import MakeDetector
from stabnorm.monitor.gradient_norm import gradient_norm
from stabnorm.monitor.monitor import StabilityMonitor, check_options
from stabnorm.monitor.outputs import Guard
from stabnorm.monitor.record import MOST_BYTES, RecordWriter, check_most_bytes
from stabnorm.monitor.statistics import Statistic, resolve
from stabnorm.recorder.recorder import FlightRecorder

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class StabilityCallback(Callback):
    """Watches every normalization layer of a run at every optimizer step; it needs no argument.

    It writes the full record into the run's folder, where TensorBoard's tab "Stability" finds it. Every ``flush_every``
    steps it writes a dozen scalars to every logger. It warns when a layer's statistics leave their usual range, and
    then draws every layer against its usual value and writes ``report.md`` into the run's folder. At the end of the
    training it does so again, and writes further heat maps and a table of the layers that you should look at. It
    changes no bit of the training.

    The hooks are registered at the start of `fit`, after checkpoint loading and wrapping, and errors are raised then,
    before the first batch. The hooks are removed at the end of `fit` and on an exception. Validation, sanity check and
    learning-rate searches do not count. With several ranks the measurements are merged: all ranks have the statistics
    of the whole batch, and rank 0 writes them.

    Args:
        preset: "economy", "standard", "full", or a list of statistics: names, or `Statistic` objects of your own.
            Default: "standard".
        flush_every: number of optimizer steps between two flushes; the record has every step. Default: 50.
        include: a regular expression, or a list of them, for the names of the layers to watch. Default: all.
        exclude: the same for layers to leave out. Default: none.
        gradients: False leaves out the gradient statistics. Default: True.
        mask: which tokens are valid, so that padding does not count: a key or an attribute of the batch (an index, for
            a tuple), or a function of the batch, with a bool tensor, True = valid. A function may return several masks,
            one for each length. Default: every token is valid.
        companions: what to watch beside the norms, by name ("attention", "weights", "embedding", "output",
            "curvature", "switch") or as objects of `stabnorm.companions`. Default: nothing.
        fused: compute torch's LayerNorm and RMSNorm and their statistics in one pass, if there is a kernel for both,
            see `StabilityMonitor`; this changes their last bits. Default: False.
        detector: class or function that makes the detectors, which raise the alerts, see
            `stabnorm.monitor.detect.Detector`. Default: `RobustDetector`.
        budget: the share of a step that watching may take, such as 0.02. What is costly and raises no alert, such as
            the affine residual and, in "full", medians, is then measured at every k-th step, with the least k that
            fits, and is NaN at the others. Default: none, and every statistic is measured at every step.
        on_alert: a function that is called with each `stabnorm.Alert`, at the flush that brings it, on rank 0. If it
            raises an error, this is logged once and the training goes on. Default: none.
        actions: what to do at an alarm: a dict from its kind to an action, or a list of them, such as
            ``{"non_finite": "skip", "any": "checkpoint"}``. The kinds are "non_finite", "spike", "bound",
            "one_layer", "from_here_on", "everywhere", "training" and "any"; the actions are "log", "checkpoint",
            "skip", "clip", "reduce_lr", "qk_clip", "rollback", "hold_switch" and "stop", or objects of
            `stabnorm.actions`, which have options. Default: alarms are logged, and nothing is done.
        dumps: how many dumps are written into `dumps/` of the run's folder, at most: the last steps, and a batch with
            the weights before it, at an alarm, an exception or SIGTERM; ``stabnorm replay`` runs it again. 0 writes
            none. Default: 3.
        record_bytes: what the record may take on the disk. Beyond it old steps are thinned, and each layer's extremes
            stay at their steps, see `stabnorm.FileRecord`. None keeps every value. Default: 256 MiB.

    `trainer.callback_metrics` has ``stability/alerts``, the number of alerts so far, and ``stability/worst_score``, the
    detector's highest score in the last flush (alerts begin at 6 or above), for EarlyStopping and ModelCheckpoint.

    Raises:
        TypeError: an argument has another type.
        ValueError: an unknown preset, statistic or companion, a flush interval below 1; at the start of `fit`: no norm
            to watch, or nothing for a companion; at the first forward: a mask that does not fit a layer.

    >>> from stabnorm.callbacks import StabilityCallback
    >>> StabilityCallback(preset="standart")
    Traceback (most recent call last):
    ...
    ValueError: unknown preset 'standart': the presets are economy, standard, full; did you mean 'standard'?
    """

    def __init__(
        self,
        preset: str | list[str | Statistic] = "standard",
        flush_every: int = 50,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        gradients: bool = True,
        mask: Callable[[Any], Tensor | Sequence[Tensor]] | int | str | None = None,
        companions: Sequence[str | Companion] = (),
        fused: bool = False,
        detector: MakeDetector | None = None,
        on_alert: Callable[[Alert], object] | None = None,
        actions: dict[str, Any] | None = None,
        budget: float | None = None,
        dumps: int = 3,
        record_bytes: int | None = MOST_BYTES,
    ) -> None:
        super().__init__()
        resolve(preset)
        resolve_actions(actions or {})
        check_count("dumps", dumps, 0, hint=": the largest number of dumps")
        check_most_bytes("record_bytes", record_bytes)
        self.dumps, self.record_bytes = dumps, record_bytes
        self.companions = resolve_companions(companions)
        self.fused, self.detector, self.on_alert, self.actions = fused, detector, on_alert, actions
        self.budget = budget
        check_options(
            flush_every=flush_every,
            gradients=gradients,
            fused=fused,
            detector=detector,
            on_alert=on_alert,
            budget=budget,
        )
        NameFilter(include, exclude)  # complain now
        self.preset, self.flush_every, self.gradients, self.mask = preset, flush_every, gradients, mask
        self.include, self.exclude = include, exclude
        self.monitor: StabilityMonitor | None = None
        self.directory: Path | None = None
        self.responses: Actions | None = None
        self.recorder: FlightRecorder | None = None
        self._indices = BatchIndices()
        self._live: LiveReport | None = None
        self._records: list[RecordWriter] = []
        self._saved: dict[str, Any] | None = None
        self._saved_actions: dict[str, Any] = {}
        self._batch_mask = BatchMask(mask)
        self._step = OpenStep()
        self._fitting = self._counted = self._loaded = False
        self._told = False  # whether other callbacks know of this fit's alerts
        self._feed: Feed | None = None  # of the epoch

    @staticmethod
    def of(trainer: "Trainer") -> "StabilityCallback | None":
        """Return the Trainer's `StabilityCallback`, if it has one; our other callbacks share its monitor."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set in the Trainer's constructor
        return next((callback for callback in callbacks if isinstance(callback, StabilityCallback)), None)

    def __repr__(self) -> str:
        return described(self)

    # -- start and end of a fit ----------------------------------------------------------------------------------------

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Forget an earlier run, so that nothing of it is restored where a tuner saves and restores its callbacks."""
        if stage == "fit":
            begin_run(trainer)
            self.monitor = self.responses = self.recorder = None
            if trainer.global_step == 0:
                self._saved, self._saved_actions, self._loaded = None, {}, False

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Find the norms and register the hooks; layers, checkpoint and devices are final now."""
        monitor = StabilityMonitor(
            pl_module,
            self.preset,
            flush_every=self.flush_every,
            include=self.include,
            exclude=self.exclude,
            gradients=self.gradients,
            companions=self.companions,
            fused=self.fused,
            detector=self.detector,
            on_alert=self.on_alert,
            budget=self.budget,
        )
        if monitor.companions.computes_loss:
            check_loss_again(pl_module)
        # After a checkpoint, or in a second fit of the same Trainer; in a new run the callback starts again.
        if self._saved is not None and (self._loaded or trainer.global_step > 0):
            monitor.load_state_dict(self._saved)
        if not self._loaded:
            self._feed = None
        self.monitor, self._step, self._loaded = monitor, OpenStep(), False
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            self.directory = output_directory(trainer)
            names = [statistic.name for statistic in monitor.statistics]
            alerts, overhead = (lambda: len(monitor.alerts)), (lambda: monitor.cost.percent)
            self._records = record_writers(trainer, monitor.outputs, self.directory, self.record_bytes)
            monitor.records = [*self._records]
            monitor.records += headline_writers(trainer, monitor.outputs, names, alerts, overhead)
            monitor.records += alert_writers(trainer, monitor.outputs)
            show_messages()
            self._live = LiveReport(trainer, monitor, self.directory)
            monitor.records.append(self._live.writer)
        self.responses = actions_of(trainer, pl_module, monitor, self.actions or {})
        if self.responses is not None:
            self.responses.load_state_dict(self._saved_actions)
        self.recorder = recorder_of(trainer, pl_module, monitor, self.dumps)
        monitor.attach()
        if self.recorder is not None:
            self._indices.attach()
        self._fitting, self._counted, self._told = True, False, False

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Remove the hooks, and write pictures and closing table while the loggers are still open."""
        self._release()
        if self.monitor is not None and self._fitting:
            self._fitting = False
            self.monitor.flush()
            if self.recorder is not None:
                self.recorder.close()
            self._saved = self.monitor.state_dict()
            if trainer.is_global_zero:
                ClosingReport(trainer, self.monitor, self.directory, self._live).write()

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Remove the hooks and write the closing report; an error in the report does not hide the exception."""
        self._release()  # first, because Lightning does not call `teardown` after an exception
        if self.recorder is not None and self._fitting and not isinstance(exception, KeyboardInterrupt):
            self.recorder.crashed(exception)
        Guard().attempt("there is no closing report", self.on_train_end, trainer, pl_module)
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Remove the hooks and close the record, in any case."""
        self._release()
        if self.monitor is not None:
            self.monitor.outputs.close(self.monitor.records)
            self.monitor.records = []

    def write_event(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        """Write an event into the record, also after the training, as long as the loggers are open."""
        if self.monitor is not None:
            for record in self._records:
                what = f"the event {kind!r} cannot be written"
                self.monitor.outputs.attempt(what, record.write_event, kind, step, data)

    def _release(self) -> None:
        self._batch_mask.leave()
        self._indices.detach()
        if self._live is not None:
            self._live.leave_bar()
        if self.monitor is not None:
            self.monitor.detach()

    # -- a step --------------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Open a step unless gradients accumulate, and set the mask of valid tokens."""
        assert self.monitor is not None
        if not self._counted:
            self.monitor.steps_done, self._counted = logged_steps(trainer), True
            self._see_feed(trainer)  # here, too, because a run may go on within an epoch
        if not self._step.open:
            self.monitor.discard()  # forwards of a learning-rate search, for example
            self._step = OpenStep(open=True)
            if self.responses is not None:
                self.responses.begin_step()
        self._batch_mask.enter(batch)
        if self.recorder is not None:
            self.recorder.begin(batch, indices=self._indices.next(trainer), masks=self._batch_mask.masks)
        if self.monitor.companions.computes_loss:
            self._step.loss_again = loss_again(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: "Trainer", pl_module: "LightningModule", loss: Tensor) -> None:
        """Note the loss, where an action is decided by it."""
        if self.responses is not None:
            self.responses.see_loss(loss)

    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: "Optimizer"
    ) -> None:
        """Remember learning rate and loss scale, which change before the end of the batch; perhaps skip the step."""
        if not self._step.stepped:
            self._step.learning_rate = learning_rate(optimizer)
        scale, norm = loss_scale(trainer), None
        if self.gradients and self.monitor is not None:
            norm = self.monitor.outputs.attempt("the gradient's norm is not watched", gradient_norm, optimizer, scale)
            self._step.add_gradient_norm(norm)
        if scale is not None:
            self._step.grad_scales[optimizer] = scale.clone() if isinstance(scale, Tensor) else scale
        self._step.stepped = True
        if self.responses is not None and self.responses.skips(optimizer, gradient_norm=norm):
            verdict = self.responses.verdict
            if verdict.here and self.recorder is not None:
                self.recorder.alarm(verdict.kind, verdict.reason, verdict.layer)

    def on_train_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """End the step when an optimizer stepped in this batch."""
        step = self._step
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            step.add_loss(loss.detach().reshape(()), alone=not pl_module.automatic_optimization)
            if step.stepped and pl_module.automatic_optimization:
                # Lightning has divided by as many batches as it wanted to accumulate; the epoch may be over before.
                step.scale_loss(trainer.accumulate_grad_batches)
        if step.stepped and self.monitor is not None:
            self.monitor.step(
                loss=step.loss,
                learning_rate=step.learning_rate,
                gradient_norm=step.gradient_norm,
                grad_scale=step.grad_scales or None,
                optimizer=[optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Optimizer)],
                closure=step.loss_again,
            )
            self._step = OpenStep()
            if self.responses is not None:
                self.responses.end_step()
            if self.recorder is not None:
                self.recorder.end(step.loss)
            if self.monitor.flushed or not self._told:
                self._tell_callbacks(trainer, pl_module, self.monitor)
        self._batch_mask.leave()  # only now, because the loss may have been computed again

    def _tell_callbacks(self, trainer: "Trainer", pl_module: "LightningModule", monitor: StabilityMonitor) -> None:
        """Put into `trainer.callback_metrics` what EarlyStopping and ModelCheckpoint may ask for."""
        self._told = True
        if getattr(trainer, "barebones", False):  # where nobody logs, and no callback asks
            return
        for name, value in (("alerts", float(len(monitor.alerts))), ("worst_score", monitor.worst_score)):
            pl_module.log(f"stability/{name}", value, on_step=True, on_epoch=False, logger=False, batch_size=1)

    def on_train_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Forget a step that the last epoch left open; automatic optimization drops its gradients, too."""
        if pl_module.automatic_optimization:
            self._step = OpenStep()
        self._see_feed(trainer)

    def _see_feed(self, trainer: "Trainer") -> None:
        """Announce what the user has changed since the last epoch, or since the checkpoint."""
        feed = Feed.of(trainer)
        change = "" if self._feed is None else feed.change(self._feed)
        self._feed = feed
        if change and self.monitor is not None:
            self.monitor.announce_change(change)

    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Count no forward of a validation, also where the model stays in training mode, as for MC dropout."""
        if self.monitor is not None:
            self.monitor.pause()

    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Go on with the open step."""
        if self.monitor is not None:
            self.monitor.resume()

    # -- checkpoints and copies ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return baselines and step counter as tensors and plain containers, because Lightning loads weights only."""
        saved = self.monitor.state_dict() if self.monitor is not None else self._saved
        actions = self._saved_actions if self.responses is None else self.responses.state_dict()
        feed = None if self._feed is None else self._feed.saved()
        return {} if saved is None else {"version": 1, "monitor": saved, "actions": actions, "feed": feed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the layers exist; in a training only a tuner restores, which is no resume."""
        check_state(state_dict, "StabilityCallback", ["monitor"], empty=True)
        if self._fitting and self._counted:
            return
        self._saved, self._saved_actions = state_dict.get("monitor"), state_dict.get("actions", {})
        self._loaded, self._feed = self._saved is not None, Feed.of_saved(state_dict.get("feed"))
        if self._fitting and self._saved is not None and self.monitor is not None:
            self.monitor.load_state_dict(self._saved)  # some strategies load checkpoints after the start of the fit
            if self.responses is not None:
                self.responses.load_state_dict(self._saved_actions)

    def __getstate__(self) -> dict[str, Any]:
        saved = self.state_dict().get("monitor")
        return state_to_pickle(
            self,
            monitor=None,
            responses=None,
            recorder=None,
            _indices=BatchIndices(),
            _live=None,
            _records=[],
            _fitting=False,
            _step=OpenStep(),
            _saved=saved,
        )
