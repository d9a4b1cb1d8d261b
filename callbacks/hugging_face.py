"""`StabilityTrainerCallback`: watch the norms of a model that Hugging Face's Trainer trains."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from stabnorm._checks import check_count, check_instance
from stabnorm._models.hooks import counting_paused, take_off
from stabnorm._models.masks import valid_tokens
from stabnorm._models.names import NameFilter
from stabnorm.actions.action import Training
from stabnorm.actions.actions import Actions, resolve_actions
from stabnorm.callbacks._changes import Feed
from stabnorm.callbacks._clipped_norm import ClippedNorm
from stabnorm.callbacks._open_step import OpenStep
from stabnorm.callbacks._optimizers import innermost, scale_of
from stabnorm.companions.companion import Companion
from stabnorm.companions.names import resolve_companions
from stabnorm.monitor._folders import FOLDER, replace_file
from stabnorm.monitor.alerts import Alert
from stabnorm.monitor.detect import MakeDetector
from stabnorm.monitor.monitor import StabilityMonitor, check_options
from stabnorm.monitor.record import MOST_BYTES, FileRecord, check_most_bytes
from stabnorm.monitor.statistics import resolve
from stabnorm.recorder.again import loss_in
from stabnorm.recorder.recorder import FlightRecorder
from stabnorm.statistic import Statistic

if TYPE_CHECKING:
    TrainerCallback = object
else:
    try:
        from transformers import TrainerCallback
    except ImportError:  # then nobody calls it, but it can be read
        TrainerCallback = object


class StabilityTrainerCallback(TrainerCallback):
    """Watches the norms of the Trainer's model at every optimizer step; it needs no argument.

    The record is in `stabnorm_logs/` of the output directory. The monitor's state lies beside each checkpoint, so a
    resumed run goes on from there; if batch size, accumulation, precision or learning rate were changed meanwhile, this
    is announced to the monitor. The loss is the one that the model returns, and the norm of the gradient is that before
    clipping. A model that the Trainer compiles has neither mask nor loss.

    Args:
        preset: as for `StabilityMonitor`. Default: "standard".
        flush_every: number of optimizer steps between two flushes. Default: 50.
        include: a regular expression, or a list of them, for the names of the layers to watch. Default: all.
        exclude: the same for layers to leave out. Default: none.
        gradients: False leaves out the gradient statistics. Default: True.
        mask: the keyword argument of the model that says which tokens are valid, so that padding does not count: a
            tensor [batch, length] of 0 and 1. It is ignored where the model does not get it, and where the Trainer
            compiles the model. None: every token counts. Default: "attention_mask".
        companions: what to watch beside the norms, as for `StabilityMonitor`. Default: nothing.
        detector: as for `StabilityMonitor`. Default: `RobustDetector`.
        on_alert: as for `StabilityMonitor`. Default: none.
        budget: as for `StabilityMonitor`. Default: none.
        actions: what to do at an alarm, as for `StabilityCallback`: a dict from its kind to an action, or a list of
            them. "checkpoint" lets the Trainer save one of its own. Default: alarms are logged, and nothing is done.
        dumps: how many dumps are written at alarms, at most, into `dumps/` beside the record, see
            `stabnorm.recorder.FlightRecorder`; the arguments of the model are the batch. Default: 3.
        record_bytes: what the record may take on the disk, as for `StabilityCallback`. Default: 256 MiB.

    Attributes:
        monitor: the `StabilityMonitor` of the current training or the last one; None before.

    Raises:
        TypeError: an argument has another type.
        ValueError: an unknown preset, statistic or companion, or the companion "curvature"; at the start of the
            training: no norm to watch, or an action that cannot be done, such as "hold_switch".

    >>> from stabnorm.callbacks.hugging_face import StabilityTrainerCallback
    >>> callback = StabilityTrainerCallback(flush_every=20)  # Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        preset: str | list[str | Statistic] = "standard",
        flush_every: int = 50,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        gradients: bool = True,
        mask: str | None = "attention_mask",
        companions: Sequence[str | Companion] = (),
        detector: MakeDetector | None = None,
        on_alert: Callable[[Alert], object] | None = None,
        budget: float | None = None,
        actions: dict[str, Any] | None = None,
        dumps: int = 3,
        record_bytes: int | None = MOST_BYTES,
    ) -> None:
        resolve(preset)
        resolve_actions(actions or {})
        check_count("dumps", dumps, 0, hint=": the largest number of dumps")
        check_options(
            flush_every=flush_every,
            gradients=gradients,
            fused=False,
            detector=detector,
            on_alert=on_alert,
            budget=budget,
        )
        check_most_bytes("record_bytes", record_bytes)
        NameFilter(include, exclude)  # complain now
        if mask is not None:
            check_instance("mask", mask, str, "the name of the model's argument, or None")
        beside = resolve_companions(companions)
        for companion in beside:
            if companion.computes_loss:
                raise ValueError(
                    f"the companion {companion.name!r} computes the loss of a batch again, which Hugging Face's "
                    "Trainer does not hand out. Leave it out"
                )
        self.options: dict[str, Any] = {
            "preset": preset,
            "flush_every": flush_every,
            "include": include,
            "exclude": exclude,
            "gradients": gradients,
            "companions": beside,
            "detector": detector,
            "on_alert": on_alert,
            "budget": budget,
        }
        self.mask, self.actions, self.dumps, self.record_bytes = mask, actions or {}, dumps, record_bytes
        self.monitor: StabilityMonitor | None = None
        self.responses: Actions | None = None
        self.recorder: FlightRecorder | None = None
        self._step, self._feed = OpenStep(), Feed()
        self._clipped: ClippedNorm | None = None
        self._control: Any = None
        self._open: valid_tokens | None = None
        self._handles: list[RemovableHandle] = []

    # -- a training ----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Register the hooks; a resumed run goes on from the state that lies beside the checkpoint."""
        monitor = self.monitor = StabilityMonitor(model, **self.options)
        self._control, self._step, self._feed = control, OpenStep(), _feed_of(args, kwargs.get("train_dataloader"))
        self.responses = self._actions_of(args, monitor, kwargs)
        if state.is_world_process_zero:
            monitor.records.append(FileRecord(Path(args.output_dir) / FOLDER, self.record_bytes))
        self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "stabnorm.pt", monitor)
        monitor.steps_done = state.global_step
        monitor.attach()
        self._clipped = ClippedNorm(monitor.model)
        self._clipped.attach()
        self.recorder = None
        if not getattr(args, "torch_compile", False):
            self.recorder = self._recorder_of(args, monitor)
            self._handles = [
                model.register_forward_pre_hook(self._open_mask, with_kwargs=True),
                model.register_forward_hook(self._close_mask, always_call=True),
                model.register_forward_hook(self._see_loss, with_kwargs=True),
            ]

    def _actions_of(self, args: Any, monitor: StabilityMonitor, known: Mapping[str, Any]) -> Actions | None:
        if not any(resolve_actions(self.actions).values()):
            return None
        optimizer, scheduler = innermost(known.get("optimizer")), known.get("lr_scheduler")
        if not isinstance(optimizer, Optimizer) or getattr(args, "deepspeed", None):
            raise ValueError(
                "this training has no optimizer of torch whose step could be left out, as with DeepSpeed. Leave the "
                "argument actions out"
            )
        training = Training(
            monitor.model,
            monitor,
            [optimizer],
            schedulers=[] if scheduler is None else [scheduler],
            scaler=getattr(known.get("optimizer"), "scaler", None),
            directory=Path(args.output_dir),
            save=self._save,
            stop=self._stop,
        )
        return Actions(training, self.actions)

    def _recorder_of(self, args: Any, monitor: StabilityMonitor) -> FlightRecorder | None:
        """Return what writes dumps: the arguments of the model's forward are the batch."""
        if not self.dumps:
            return None
        about = {"micro_batches": getattr(args, "gradient_accumulation_steps", 1)}
        folder = Path(args.output_dir) / FOLDER / "dumps"
        return FlightRecorder(monitor, folder, times=self.dumps, loss=_loss_of, about=about)

    def _save(self, path: Path) -> str:
        """Let the Trainer save a checkpoint of its own after this step, with optimizer and schedule."""
        self._control.should_save = True
        return "the Trainer saves a checkpoint"

    def _stop(self, reason: str) -> None:
        self._control.should_training_stop = True

    def _resume(self, file: Path, monitor: StabilityMonitor) -> None:
        if not file.exists():
            return
        load = functools.partial(torch.load, file, weights_only=True)
        state = monitor.outputs.attempt(f"{file} cannot be read", load)
        if state is None:
            return
        monitor.load_state_dict(state.get("monitor", state))
        if self.responses is not None:
            self.responses.load_state_dict(state.get("actions", {}))
        before = Feed.of_saved(state.get("feed"))
        change = "" if before is None else self._feed.change(before)
        if change:
            monitor.announce_change(change)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a step, whose micro-batches count as one."""
        assert self.monitor is not None
        self._control = control
        self.monitor.discard()
        self._step = OpenStep(open=True)
        what = "the scheduler does not tell the learning rate"
        self._step.learning_rate = self.monitor.outputs.attempt(what, _last_rate, kwargs.get("lr_scheduler"))
        if self.responses is not None:
            self.responses.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the norm of the gradient, and perhaps leave the step out."""
        assert self.monitor is not None
        assert self._clipped is not None
        optimizer = innermost(kwargs.get("optimizer"))
        known = [optimizer] if isinstance(optimizer, Optimizer) else []
        what = "the gradient's norm is not watched"
        self._step.gradient_norm = self.monitor.outputs.attempt(what, self._clipped.take, *known)
        scale = scale_of(getattr(kwargs.get("optimizer"), "scaler", None))
        if scale is not None and known:
            self._step.grad_scales[known[0]] = scale.clone() if isinstance(scale, Tensor) else scale
        if self.responses is not None:
            skipped = self.responses.skips(known, gradient_norm=self._step.gradient_norm)
            verdict = self.responses.verdict
            if skipped and verdict.here and self.recorder is not None:
                self.recorder.alarm(verdict.kind, verdict.reason, verdict.layer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a step, because the optimizer has stepped."""
        assert self.monitor is not None
        self._control, step = control, self._step
        self.monitor.step(
            learning_rate=step.learning_rate,
            loss=step.loss,
            gradient_norm=step.gradient_norm,
            grad_scale=step.grad_scales or None,
        )
        if self.responses is not None:
            self.responses.end_step()
        if self.recorder is not None:
            self.recorder.end(step.loss)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Announce another data set or batch size."""
        feed = _feed_of(args, kwargs.get("train_dataloader"))
        change, self._feed = feed.change(self._feed), feed
        if change and self.monitor is not None:
            self.monitor.announce_change(change)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the monitor's state beside the model's."""
        assert self.monitor is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            saved = {
                "monitor": self.monitor.state_dict(),
                "actions": {} if self.responses is None else self.responses.state_dict(),
                "feed": self._feed.saved(),
            }
            torch.save(saved, content := io.BytesIO())
            what = "the monitor's state cannot be saved"
            self.monitor.outputs.attempt(what, replace_file, folder / "stabnorm.pt", content.getvalue())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks, and write what was measured."""
        assert self.monitor is not None
        if self._clipped is not None:
            self._clipped.detach()
        take_off(self._handles)
        self._close_mask()
        self.monitor.detach()
        self.monitor.flush()
        if self.recorder is not None:
            self.recorder.close()
        self.monitor.outputs.close(self.monitor.records)
        self.monitor.records = []

    # -- a forward -----------------------------------------------------------------------------------------------------

    def _see_loss(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """Note the loss that a model returns; of several micro-batches the mean, or the sum of shares."""
        loss = loss_in(output)
        if not module.training or loss is None or counting_paused():
            return
        if self.responses is not None:
            self.responses.see_loss(loss)
        step, whole = self._step, loss.detach().reshape(()).float()
        if kwargs.get("num_items_in_batch") is not None:  # of the whole step, by which the model has divided
            step.add_loss(whole)
        else:
            before = 0.0 if step.loss is None else step.loss * step.batches
            step.add_loss((before + whole) / (step.batches + 1), alone=True)

    def _open_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._close_mask()
        if not module.training or counting_paused():  # as when the recorder runs a batch again
            return
        mask = kwargs.get(self.mask) if self.mask is not None else None
        masks = [mask.bool()] if isinstance(mask, Tensor) and mask.ndim == 2 else []
        if self.recorder is not None and kwargs and not args:
            self.recorder.begin(kwargs, masks=masks)
        if masks:
            self._open = valid_tokens(*masks)
            self._open.__enter__()

    def _close_mask(self, *_: Any) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


def _last_rate(scheduler: Any) -> float | Tensor:
    """Return the learning rate of the step that begins; a tensor is copied, because the scheduler changes it."""
    rate = scheduler.get_last_lr()[0]
    return rate.detach().clone() if isinstance(rate, Tensor) else float(rate)


def _loss_of(model: nn.Module, batch: Any) -> Tensor | None:
    return loss_in(model(**batch))


def _feed_of(args: Any, loader: Any) -> Feed:
    size = getattr(args, "train_batch_size", None)
    precision = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), "fp32")
    feed = Feed.of_loader(
        loader,
        batches=getattr(args, "gradient_accumulation_steps", None),
        precision=precision,
        learning_rate=getattr(args, "learning_rate", None),
    )
    return feed if size is None else feed._replace(batch_size=size)
