"""`FoldCallback`: the model without its norms, as files, at the end of a Lightning Trainer's fit."""

import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stabnorm._checks import check_function, check_instance, check_names, nearest
from stabnorm._models.batches import arguments_of
from stabnorm._models.copies import copied
from stabnorm._models.examples import Example, first_rows, read_examples
from stabnorm._models.random_state import random_state_kept
from stabnorm.callbacks._lightning import Callback
from stabnorm.callbacks._outputs import begin_run, log_text, output_directory
from stabnorm.callbacks._trainer import described, logged_steps, state_to_pickle
from stabnorm.callbacks.stability import StabilityCallback
from stabnorm.errors import StabNormError
from stabnorm.fold import FoldResult, fold_norms
from stabnorm.fold.fold import check_options as check_fold_options
from stabnorm.monitor.outputs import Guard
from stabnorm.norms import find_norms
from stabnorm.norms.affine import affine_in_eval

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

ROWS = 4  # of the first batch; folding takes some twenty forwards
_SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


class FoldCallback(Callback):
    """Folds a copy of the trained model with `fold_norms` and saves it; needs no argument.

    After a fit, the folder ``stabnorm_logs`` in the logger's own holds ``folded.pt`` (the state dict of the folded
    model), ``folded_manifest.json`` (what changed in its structure) and ``folded_report.txt``. The report is also
    printed, and logged to TensorBoard. With the manifest the weights load into a model that is built like the trained
    one::

        model = apply_manifest(build(), json.loads(Path("folded_manifest.json").read_text(encoding="utf-8")))
        model.load_state_dict(torch.load("folded.pt"))

    `build` gives the model with its own norms where all norms were folded. Where the report says that some are kept,
    call `convert_norms` before `apply_manifest`, because they are PRepBN.

    The LightningModule does not change: it can be trained further, and checkpoints hold its norms. The callback's place
    among the others does not matter, because it acts in `teardown`, after they have finished with the model.

    The model must have something to fold: add `ProgressiveNormCallback`, or convert the model with `convert_norms` and
    move lam to 0 yourself; BatchNorm folds as well. The model is folded once on trial before the first training step,
    so that an example that does not run, or a compiled part, is an error then. An error at the end becomes a warning,
    and nothing is written, so that the training is not lost. Both folds happen on the CPU, where Lightning has put the
    model by then. They take some seconds, and the memory of a few copies of the model, half of them in float64. With
    several processes the first one folds.

    Args:
        module: name of the part to fold, ``"net"`` say. Default: the LightningModule itself, by its `forward`.
        example: what `fold_norms` runs that part on, in its formats; or a function of a batch that gives it. Default:
            the first rows of the first batch of validation or training. A tensor is the input, a tuple or list is
            ``(input, targets, ...)``, a mapping holds keyword arguments.
        options: further arguments of `fold_norms`. Default: none.

    Attributes:
        result: what `fold_norms` returned at the end, with the folded model; None before.
        directory: the folder of the files; None where none were written.

    Raises:
        TypeError: `example` has none of the formats, or `fold_norms` no such option.
        ValueError: at the start of `fit`: there is no such part, or it does not run on the example.
        StabNormError: at the start of `fit`: nothing could fold at its end, the strategy shards the model, or the part
            is compiled or scripted.

    >>> from stabnorm.callbacks import FoldCallback
    >>> FoldCallback(options={"stricht": True})
    Traceback (most recent call last):
    ...
    TypeError: fold_norms has no option 'stricht'. It takes check, outputs, residual, strict, tied; did you mean...
    """

    def __init__(
        self,
        module: str = "",
        example: Any | Callable[[Any], Any] = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        known = sorted(set(inspect.signature(fold_norms).parameters) - {"model", "example", "inplace"})
        check_instance("module", module, str, "the name of a part, or leave it out")
        if options is not None:
            check_names("fold_norms", options, known)
            check_fold_options(**options)
        if callable(example):
            check_function("example", example, "batch")
        self.module, self.options = module, dict(options or {})
        self._of_batch: Callable[[Any], Any] = example if callable(example) else arguments_of
        self._given = None if example is None or callable(example) else read_examples("example", example)
        self._examples: list[Example] | None = None
        self._fitting = False
        self.result: FoldResult | None = None
        self.directory: Path | None = None

    def __repr__(self) -> str:
        example = None if self._of_batch is arguments_of else self._of_batch
        return described(self, example=example if self._given is None else self._given, options=self.options or None)

    # -- before the training: say what cannot work ---------------------------------------------------------------------

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Let the run have a folder of its own."""
        if stage == "fit":
            begin_run(trainer)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Check all that can be checked now, when the model is built and converted."""
        sharding = _SHARDING.intersection(cls.__name__ for cls in type(trainer.strategy).__mro__)
        if sharding:
            raise StabNormError(
                f"{min(sharding)} shards the parameters, and folding wants them whole. Fold afterwards, with "
                "fold_norms on a model that has loaded the checkpoint"
            )
        part = self._part(pl_module)
        if not any(map(_may_fold, part.modules())):
            norms = find_norms(part)
            why = f"its norms are {type(norms[0].module).__name__} and the like" if norms else "it has no norms"
            raise StabNormError(
                f"nothing in {self.module or type(pl_module).__name__} could be folded at the end: {why}. Add "
                "ProgressiveNormCallback(), or convert the model with stabnorm.convert_norms"
            )
        self._fitting, self._examples, self.result, self.directory = True, None, None, None
        if self._given is not None and trainer.is_global_zero:
            self._try(pl_module, [self._given])

    def on_validation_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Make the example from the first batch of the sanity check, if there is one."""
        self._take(trainer, pl_module, batch)

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Make the example from the first batch of the training, unless there is one."""
        self._take(trainer, pl_module, batch)

    def _part(self, pl_module: "LightningModule") -> nn.Module:
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError as error:
            parts = ", ".join(name for name, _ in pl_module.named_children())
            hint = nearest(self.module, (name for name, _ in pl_module.named_modules()))
            raise ValueError(f"{type(pl_module).__name__} has no part {self.module!r}. It has {parts}{hint}") from error

    def _take(self, trainer: "Trainer", pl_module: "LightningModule", batch: Any) -> None:
        if not self._fitting or self._examples is not None or not trainer.is_global_zero:
            return
        examples = [example.map(torch.clone) for example in read_examples("example", self._of_batch(batch))]
        few = [first_rows(example, ROWS) for example in examples]
        self._try(pl_module, [few, examples])

    def _try(self, pl_module: "LightningModule", candidates: list[list[Example]]) -> None:
        """Fold with the first of these examples on which the model runs, and keep it for the end."""
        error: ValueError | None = None
        for examples in candidates:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # for example of a head that is still at zero
                    self._fold(pl_module, examples, strict=False)  # norms may stay before the switch is over
            except ValueError as failed:
                error = failed
            else:
                self._examples = examples
                return
        what = self.module or type(pl_module).__name__
        raise ValueError(
            f"FoldCallback cannot fold {what}: {error}. Say what it is called with, example=lambda batch: batch['x'] "
            "for instance, or name the part that is the model itself, module='net' for instance"
        ) from error

    # -- the end -------------------------------------------------------------------------------------------------------

    def _fold(self, pl_module: "LightningModule", examples: list[Example], **changed: Any) -> FoldResult:
        cpu = torch.device("cpu")
        with random_state_kept(cpu):
            copy = copied(self._part(pl_module)).to(cpu).eval()
            moved = [example.map(lambda t: t.to(cpu)) for example in examples]
            return fold_norms(copy, [(e.args, e.kwargs) for e in moved], inplace=True, **{**self.options, **changed})

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Fold the model and write the files, after a fit that reached its end."""
        fitting, self._fitting = self._fitting, False
        if not fitting or not trainer.is_global_zero:
            return
        try:
            if self._examples is None:
                raise StabNormError("no batch was seen to take an example from. Pass example=")
            result = self._fold(pl_module, self._examples)
            if all(norm.status == "kept" for norm in result.norms):
                raise StabNormError(f"every norm stays.\n{result}")
            directory = None if getattr(trainer, "fast_dev_run", False) else output_directory(trainer)
            if directory is not None:
                _write(result, directory)
        except Exception as error:  # a full disk, no memory: whatever it is, the training must not be lost
            what = str(error) if isinstance(error, StabNormError | ValueError) else f"{type(error).__name__}: {error}"
            warnings.warn(f"FoldCallback wrote no folded model: {what}", stacklevel=1)  # not Lightning's fault
            return
        self.result, self.directory = result, directory
        guard = Guard()
        if (stability := StabilityCallback.of(trainer)) is not None:
            stability.write_event(
                "fold_report", max(0, logged_steps(trainer) - 1), {"norms": _described(result, self.module)}
            )
        guard.attempt("the report of the fold cannot be printed", print, result)
        log_text(trainer, guard, "stability/fold", f"```\n{result}\n```", trainer.global_step)
        if directory is not None:
            guard.attempt("the folder cannot be printed", print, f"the folded model is in {directory}")

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Do not fold a model whose training failed."""
        self._fitting = False

    def __getstate__(self) -> dict[str, Any]:
        return state_to_pickle(self, result=None, _examples=None, _fitting=False)


def _described(result: FoldResult, module: str) -> list[dict[str, str]]:
    """Say for the record what became of each norm, by its name in the whole model."""
    before = f"{module}." if module else ""
    return [
        {"name": before + norm.name, "status": norm.status, "into": ", ".join(norm.into), "reason": norm.reason}
        for norm in result.norms
    ]


def _may_fold(module: nn.Module) -> bool:
    try:
        return affine_in_eval(module) is not None
    except StabNormError:  # it cannot fold now, but perhaps at the end
        return True


def _write(result: FoldResult, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(result.model.state_dict(), directory / "folded.pt")
    (directory / "folded_manifest.json").write_text(json.dumps(result.manifest, indent=2) + "\n", encoding="utf-8")
    (directory / "folded_report.txt").write_text(f"{result}\n", encoding="utf-8")
