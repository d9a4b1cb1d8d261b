"""`StabilityTrainerCallback`: watch the norms of a model that Hugging Face's Trainer trains."""

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabnorm._checks import check_instance
from stabnorm._models.hooks import take_off
from stabnorm._models.masks import valid_tokens
from stabnorm._models.names import NameFilter
from stabnorm.companions.companion import Companion
from stabnorm.companions.names import resolve_companions
from stabnorm.monitor._folders import FOLDER, replace_file
from stabnorm.monitor.alerts import Alert
from stabnorm.monitor.detect import MakeDetector
from stabnorm.monitor.monitor import StabilityMonitor, check_options
from stabnorm.monitor.record import FileRecord
from stabnorm.monitor.statistics import resolve
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
    resumed run goes on from there. Gradients are those of the loss as it is in float32 and bf16; with fp16 they have
    its scale.

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

    Attributes:
        monitor: the `StabilityMonitor` of the current training or the last one; None before.

    Raises:
        TypeError: an argument has another type.
        ValueError: an unknown preset, statistic or companion, or the companion "curvature"; at the start of the
            training: no norm to watch.

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
    ) -> None:
        resolve(preset)
        check_options(
            flush_every=flush_every,
            gradients=gradients,
            fused=False,
            detector=detector,
            on_alert=on_alert,
            budget=budget,
        )
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
        self.mask = mask
        self.monitor: StabilityMonitor | None = None
        self.learning_rate: float | Tensor | None = None
        self._open: valid_tokens | None = None
        self._handles: list[RemovableHandle] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Register the hooks; a resumed run goes on from the state that lies beside the checkpoint."""
        monitor = self.monitor = StabilityMonitor(model, **self.options)
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "stabnorm.pt"
        if saved.exists():
            load = functools.partial(torch.load, saved, weights_only=True)
            state_dict = monitor.outputs.attempt(f"{saved} cannot be read", load)
            if state_dict is not None:
                monitor.load_state_dict(state_dict)
        monitor.steps_done = state.global_step
        if state.is_world_process_zero:
            monitor.records.append(FileRecord(Path(args.output_dir) / FOLDER))
        monitor.attach()
        if self.mask is not None and not getattr(args, "torch_compile", False):
            self._handles = [
                model.register_forward_pre_hook(self._open_mask, with_kwargs=True),
                model.register_forward_hook(self._close_mask, always_call=True),
            ]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a step, whose micro-batches count as one."""
        assert self.monitor is not None
        self.monitor.discard()
        what = "the scheduler does not tell the learning rate"
        self.learning_rate = self.monitor.outputs.attempt(what, _last_rate, kwargs.get("lr_scheduler"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a step, because the optimizer has stepped."""
        assert self.monitor is not None
        self.monitor.step(learning_rate=self.learning_rate)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the monitor's state beside the model's."""
        assert self.monitor is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.monitor.state_dict(), content := io.BytesIO())
            what = "the monitor's state cannot be saved"
            self.monitor.outputs.attempt(what, replace_file, folder / "stabnorm.pt", content.getvalue())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks, and write what was measured."""
        assert self.monitor is not None
        take_off(self._handles)
        self._close_mask()
        self.monitor.detach()
        self.monitor.flush()
        self.monitor.outputs.close(self.monitor.records)
        self.monitor.records = []

    def _open_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._close_mask()
        mask = kwargs.get(str(self.mask))
        if module.training and isinstance(mask, Tensor) and mask.ndim == 2:
            self._open = valid_tokens(mask.bool())
            self._open.__enter__()

    def _close_mask(self, *_: Any) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


def _last_rate(scheduler: Any) -> float | Tensor:
    """Return the learning rate of the step that begins; a tensor is copied, because the scheduler changes it."""
    rate = scheduler.get_last_lr()[0]
    return rate.detach().clone() if isinstance(rate, Tensor) else float(rate)
