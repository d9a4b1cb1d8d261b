"""`ProgressiveNormCallback`: switch from LayerNorm to RepBN while the model trains, with a Lightning Trainer."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stabnorm._checks import check_count
from stabnorm._log import logger
from stabnorm._models.names import NameFilter
from stabnorm._states import check_state
from stabnorm.callbacks._lightning import Callback
from stabnorm.callbacks._masks import BatchMask, MaskOfBatch
from stabnorm.callbacks._outputs import HeadlineScalars, begin_run, log_text, output_directory, record_writers
from stabnorm.callbacks._run_facts import (
    averages,
    refuse_earlier_copies,
    refuse_lost_conversion,
    refuse_other_checkpoint,
    refuse_untrained,
    steps_of_training,
    warn_of_early_judges,
)
from stabnorm.callbacks._switch_record import SwitchRecord
from stabnorm.callbacks._trainer import described, logged_steps, loss_scale, state_to_pickle, synchronises_norms
from stabnorm.callbacks.stability import StabilityCallback
from stabnorm.convert import ConversionReport, Target, check_norm_options, check_target, convert_norms, has_lam
from stabnorm.errors import StabNormError
from stabnorm.monitor.outputs import Guard, Outputs
from stabnorm.monitor.record import RecordWriter
from stabnorm.switch.lam import progressive_norms, running_norms, write_lam
from stabnorm.switch.progressive import ProgressiveSwitch
from stabnorm.switch.schedules import FRACTION, Order, check_plan, make_schedule, schedule_end

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

FLUSH_EVERY = 50  # steps, where there is no monitor


class ProgressiveNormCallback(Callback):
    r"""Switches a model from LayerNorm or RMSNorm to norms that are affine in eval; it needs no argument.

    .. math:: y = \lambda\, \mathrm{norm}(x) + (1 - \lambda)\, \mathrm{RepBN}(x),\qquad \lambda: 1 \to 0

    `convert_norms` converts the norms before optimizer, checkpoint loading and strategy see the model, also if the
    model is built in ``setup`` or ``configure_model``. Nothing else in your code changes. Build the optimizer from the
    model's parameters in ``configure_optimizers`` as usual.

    Lam follows ``trainer.global_step``, so it only changes between optimizer steps, also with gradient accumulation.
    With several optimizers (manual optimization), ``global_step`` counts the steps of all of them, and so does
    `total_steps`, which you must give there unless you give ``max_steps``. A resumed run continues as planned, even if
    it now lasts longer. An evaluation before the end uses the blend at the current lam.

    With a `StabilityCallback`, before or after this one, both share one monitor and one record. Without it, lam, the
    gap between the branches (at every 4th step) and the gate's decisions go into a record of their own, as TensorBoard
    tensors or files. A callback that copies the model in ``setup`` (WeightAveraging, StochasticWeightAveraging) must
    come after this one. At the end a table says which layers kept their norm, and why.

    Args:
        to: "prepbn", "taper", "repbn", "unified" or "power". The last three have no lam: the norms are replaced at
            once, and this callback updates their step counters and loss scale. Default: "prepbn".
        schedule: "adaptive" (a layer is switched when its norm has become nearly affine, else it keeps the norm, see
            `stabnorm.switch.AffineGate`), "linear", "cosine", "constant" (no transition), or a function of the step
            that returns lam. Default: "adaptive".
        start: the optimizer step at which the switch begins. Default: 0.
        fraction: the length of the switch as a share of the training. Default: 0.8.
        order: "together", or one layer after the other, "shallow_first" or "deep_first". Default: "together".
        include: a regular expression, or a list of them, for the names of the norms to convert. Default: all.
        exclude: the same for norms to leave alone. Default: none.
        mask: which tokens are valid, so that padding does not count: a key or an attribute of the batch (an index, for
            a tuple), or a function of the batch, with a bool tensor, True = valid. A function may return several masks,
            one for each length. Default: every token is valid.
        total_steps: optimizer steps of the training. Default: the Trainer's number.
        norm_options: further arguments of `convert_norms`. Default: none.

    Raises:
        TypeError: an argument has another type, or `norm_options` has an option that there is not.
        ValueError: an argument is out of range; or, at the start of `fit`, the schedule is longer than the training, or
            the length of the training is not known.
        StabNormError: at the start of `fit`: there is no norm to convert, a converted parameter is in no optimizer, a
            callback has copied the model before, the strategy spawns processes whose conversion would be lost
            (ddp_spawn, ddp_notebook), or the checkpoint is of a run without this callback.

    Source: arXiv:2405.11582 (SLAB).

    >>> from stabnorm.callbacks import ProgressiveNormCallback
    >>> ProgressiveNormCallback(fraction=1.5)
    Traceback (most recent call last):
    ...
    ValueError: fraction=1.5 is out of range. Give a number above 0, and 1 at most: 0.8 leaves the last fifth to the...
    """

    def __init__(
        self,
        to: Target = "prepbn",
        schedule: str | Callable[[int], float] = "adaptive",
        start: int = 0,
        fraction: float = 0.8,
        order: Order = "together",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        mask: MaskOfBatch = None,
        total_steps: int | None = None,
        norm_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_plan(schedule, start, fraction, order)
        check_target(to)
        if not has_lam(to) and (schedule, start, fraction, order) != ("adaptive", 0, FRACTION, "together"):
            given = f"schedule={schedule!r}, start={start}, fraction={fraction}, order={order!r}"
            raise ValueError(f"{given} say how lam moves, and to={to!r} has none. Leave them out")
        if total_steps is not None:
            check_count("total_steps", total_steps, hint=": optimizer steps")
        NameFilter(include, exclude)  # complain now
        if norm_options is not None:
            check_norm_options(to, norm_options)
        self.to, self.schedule, self.start, self.fraction, self.order = to, schedule, start, fraction, order
        self.include, self.exclude, self.total_steps = include, exclude, total_steps
        self.norm_options = norm_options or {}
        self.switch: ProgressiveSwitch | None = None
        self._batch_mask = BatchMask(mask)
        self._record: SwitchRecord | None = None
        self._outputs, self._own_writers = Outputs(), list[RecordWriter]()
        self._reports: list[ConversionReport] = []
        self._total = 0
        self._saved: dict[str, Any] | None = None
        self._loaded = self._counted = self._training = False

    def __repr__(self) -> str:
        return described(self, mask=self._batch_mask.mask, norm_options=self.norm_options or None)

    # -- before the training: convert, and say what cannot work --------------------------------------------------------

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Convert the norms that exist, and make `configure_model` convert those that it builds."""
        if stage == "fit":
            begin_run(trainer)
            if trainer.global_step == 0:  # nothing of an earlier run, also where a tuner saves and restores it
                self._saved, self._loaded, self.switch = None, False, None
            refuse_earlier_copies(trainer, pl_module, self)
        _unwrap(pl_module)
        convert: Callable[[nn.Module], ConversionReport] = functools.partial(
            convert_norms, to=self.to, include=self.include, exclude=self.exclude, **self.norm_options
        )
        # Callbacks after this one may copy the model as it is now. Errors are raised once the model is complete.
        self._reports = []
        with warnings.catch_warnings(), contextlib.suppress(StabNormError, ValueError):
            warnings.simplefilter("ignore")
            self._reports.append(convert(pl_module))
        own = vars(pl_module).get("configure_model")
        pl_module.configure_model = functools.partial(  # type: ignore[method-assign]  # an instance's own is called, too
            _configure_and_convert, pl_module, own, convert, self._reports, stage == "fit"
        )

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Raise every error that can be known before the first batch."""
        _unwrap(pl_module)
        if any(report.converted for report in self._reports):
            refuse_lost_conversion(trainer)
        progressive = progressive_norms(pl_module)
        converted: Mapping[str, nn.Module] = progressive or running_norms(pl_module)
        refuse_untrained(trainer, pl_module, converted.items())
        if synchronises_norms(trainer):
            for norm in running_norms(pl_module).values():
                norm.sync = True
        saved = self._resumed(trainer)
        planned = None if saved is None else int(saved["total_steps"])
        self._total, known = steps_of_training(trainer, pl_module, self.total_steps, planned)
        if known == 0:
            return  # no batch will come
        schedule, start = self._schedule(trainer)
        end = self._total if callable(schedule) else schedule_end(self._total, start=start, fraction=self.fraction)
        if end > known:
            raise ValueError(
                f"the run was planned with {self._total} optimizer steps and lam = 0 from step {end} on, but now it "
                f"ends at step {known}. Train to step {end} at least"
            )
        if planned is not None and planned != known:
            logger.info("the run now lasts %d steps; lam goes on as planned for %d", known, planned)
        options: dict[str, Any] = {"start": start, "fraction": self.fraction, "order": self.order}
        lam = [1.0] if schedule == "adaptive" else make_schedule(schedule, self._total, **options)(0)
        if any(lam) and any(norm.lam != 0 for norm in progressive.values()):
            warn_of_early_judges(trainer, end)

    def _schedule(self, trainer: "Trainer") -> tuple[str | Callable[[int], float], int]:
        """Make the schedule and start; a `fast_dev_run` does the whole switch in its few steps."""
        short = bool(getattr(trainer, "fast_dev_run", False))
        too_long = callable(self.schedule) or self.schedule == "adaptive" or self.start > 0
        return ("linear", 0) if short and too_long else (self.schedule, self.start)

    def _resumed(self, trainer: "Trainer") -> dict[str, Any] | None:
        """Return the state of the run that this one continues: from a checkpoint, or the last fit of this Trainer."""
        return self._saved if self._loaded or trainer.global_step > 0 else None

    # -- the training --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Register the hooks, and set lam for this step."""
        stability = StabilityCallback.of(trainer)
        monitor = None if stability is None else stability.monitor
        schedule, start = self._schedule(trainer)
        self.switch = ProgressiveSwitch(
            pl_module,
            self._total,
            schedule,
            start=start,
            fraction=self.fraction,
            order=self.order,
            monitor=monitor,
        )
        saved = self._resumed(trainer)
        if saved is not None:
            self.switch.load_state_dict(saved)
        self.switch.move_to(trainer.global_step)
        self._move_averages(trainer)
        self._loaded = self._counted = False
        self._training = True
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False) and self.switch.layers:
            self._outputs = Outputs() if monitor is None else monitor.outputs
            if monitor is None:
                self._own_writers = record_writers(trainer, self._outputs, output_directory(trainer))
            # Headlines are of the monitor's statistics.
            shared = [] if monitor is None else [r for r in monitor.records if not isinstance(r, HeadlineScalars)]
            watched = () if monitor is None else monitor.layers
            layers = watched if set(self.switch.layers) <= set(watched) else self.switch.layers
            writers, flush_every = self._own_writers or shared, FLUSH_EVERY if monitor is None else monitor.flush_every
            self._record = SwitchRecord(
                self._outputs, writers, trainer.loggers, layers, self.switch.layers, flush_every
            )  # fmt: skip
            if saved is not None and "record" in saved:
                self._record.load_state_dict(saved["record"])
            self.switch.recorder = self._record

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Begin a step, or continue an accumulated one."""
        assert self.switch is not None
        if not self._counted:
            self.switch.row, self._counted = logged_steps(trainer), True
        self._batch_mask.enter(batch)
        self.switch.begin(loss_scale(trainer))

    def on_train_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Set lam for the next step, when an optimizer stepped in this batch."""
        self._batch_mask.leave()
        assert self.switch is not None
        if trainer.global_step != self.switch.steps_done:
            self.switch.step(trainer.global_step)
            self._move_averages(trainer)

    def _move_averages(self, trainer: "Trainer") -> None:
        """Give averaged models the current lam: an average of lam would reach 0 late or never, and block the fold."""
        assert self.switch is not None
        for average in averages(trainer):
            norms = progressive_norms(average)
            if tuple(norms) == self.switch.layers:
                write_lam(norms.values(), self.switch.lam)

    # -- afterwards ----------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Remove the hooks, and report the outcome while the loggers are still open."""
        self._release()
        if self.switch is not None and self.switch.layers and trainer.is_global_zero:
            guard = Guard()
            guard.attempt("the outcome of the switch cannot be printed", print, self.report())
            last = max(self.switch.row - 1, 0)
            log_text(trainer, guard, "stability/switch", f"```\n{self.report()}\n```", last)

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Write lam again, because a callback that averages weights also averages the buffers."""
        if self.switch is not None:
            self.switch.write()

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Remove the hooks and write the record; Lightning calls no teardown after an exception."""
        _unwrap(pl_module)
        Guard().attempt("the record of the switch could not be written after the exception", self._release)
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Close the record; only the converted norms stay."""
        _unwrap(pl_module)
        self._release()
        self._outputs.close(self._own_writers)
        self._own_writers = []
        self._loaded = False  # the run it was loaded for is over, if only because it could not start

    def _release(self) -> None:
        self._training = False
        self._batch_mask.leave()
        if self.switch is not None:
            self._saved = self.switch.state_dict()
            self.switch.close()
        record, self._record = self._record, None
        if record is not None:
            record.flush()

    def report(self) -> str:
        """Return a text: which layers were switched, which kept their norm, and why, in the current or the last run."""
        if self.switch is None:
            return "nothing was trained yet"
        lines = [self.switch.summary()]
        left = self._reports[-1].norms if self._reports else ()
        lines += [
            f"  {norm.name}  was not converted  {norm.reason}"
            for norm in left
            if not norm.converted and norm.name not in self.switch.norms and norm.kind != "batch"
        ]
        return "\n".join(lines)

    # -- checkpoints and copies ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The schedule and its state, as plain containers, because Lightning loads weights only."""
        if self.switch is None:
            return dict(self._saved or {})
        state = self.switch.state_dict()
        return state if self._record is None else {**state, "record": self._record.state_dict()}

    def on_load_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of a run without the switch."""
        refuse_other_checkpoint(trainer, pl_module, checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was saved until the training starts; in a training only a tuner restores, which is no resume."""
        check_state(state_dict, "ProgressiveNormCallback", ["layers", "gate", "total_steps"], empty=True)
        if self._training:
            return
        self._saved, self._loaded, self.switch = state_dict or None, bool(state_dict), None

    def __getstate__(self) -> dict[str, Any]:
        saved = self.state_dict() or None
        return state_to_pickle(
            self, switch=None, _saved=saved, _record=None, _outputs=Outputs(), _own_writers=[], _training=False
        )


def _configure_and_convert(
    pl_module: "LightningModule",
    own: Callable[[], None] | None,
    convert: Callable[[nn.Module], ConversionReport],
    reports: list[ConversionReport],
    required: bool,
) -> None:
    """Replaces a module's `configure_model`; a copy of the module gets a replacement of its own."""
    if own is None:
        type(pl_module).configure_model(pl_module)
    else:
        own()
    try:
        reports.append(convert(pl_module))
    except StabNormError:
        if required:
            raise


def _unwrap(pl_module: "LightningModule") -> None:
    """Restore a module's own `configure_model`."""
    wrapper = vars(pl_module).get("configure_model")
    if isinstance(wrapper, functools.partial) and wrapper.func is _configure_and_convert:
        del pl_module.__dict__["configure_model"]
        if wrapper.args[1] is not None:
            pl_module.__dict__["configure_model"] = wrapper.args[1]
