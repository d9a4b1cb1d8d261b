"""Run the step of a dump again, and put the figures beside the recorded ones."""

import contextlib
import dataclasses
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stabnorm._models.batches import moved, run_batch
from stabnorm._models.masks import valid_tokens
from stabnorm.actions.snapshot import restore_random_state
from stabnorm.errors import StabNormError
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.monitor.outputs import cause, say
from stabnorm.monitor.statistics import CATALOGUE
from stabnorm.recorder.batch_rows import UNKNOWN, AgainstPast, BatchRows, look_at_rows
from stabnorm.recorder.dump import Dump
from stabnorm.recorder.recorder import LossOfBatch
from stabnorm.recorder.row_words import table_of

_SHOWN = 12  # rows of the table beside those of the layer that is named


@dataclass(frozen=True)
class Replayed:
    """What a step gave, then and now.

    Attributes:
        dump: the dump.
        layers, statistics: the names of rows and columns.
        recorded, again: ``[layers, statistics]``, NaN where there was nothing to measure.
        loss: of the step that was run again; NaN if there is none.
        rows: which rows of the batch did it: of the step of the alarm if the dump has its batch, else of the dump's.
            None if nothing tells which part of the batch is a row.
    """

    dump: Dump
    layers: tuple[str, ...]
    statistics: tuple[str, ...]
    recorded: npt.NDArray[np.float32]
    again: npt.NDArray[np.float32]
    loss: float
    rows: BatchRows | None = None

    @property
    def difference(self) -> float:
        """The largest difference of two figures, relative to the larger one; infinite where only one is finite."""
        one, other = self.recorded.astype(np.float64), self.again.astype(np.float64)
        same = (one == other) | (np.isnan(one) | np.isnan(other))
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = np.abs(one - other) / np.maximum(np.abs(one), np.abs(other))
        return float(np.where(same, 0, np.nan_to_num(relative, nan=np.inf, posinf=np.inf)).max(initial=0))

    def __str__(self) -> str:
        header = self.dump.header
        lines = [f"step {header['step']}, {header['kind']}: {header['reason']}"]
        if header.get("ranks", 1) > 1:
            lines.append(
                f"{header['ranks']} ranks trained; this is the batch of one, so figures differ from the recorded ones"
            )
        if not header["complete_step"]:
            lines.append("the step was not finished, so only the new figures are known")
        lines.append(f"{'layer':<32} {'statistic':<24} {'recorded':>14} {'again':>14}")
        lines += [
            f"{self.layers[i]:<32} {self.statistics[k]:<24} {self.recorded[i, k]:>14.6g} {self.again[i, k]:>14.6g}"
            for i, k in self._worth_a_look()
        ]
        known = int((np.isfinite(self.recorded) & np.isfinite(self.again)).sum())
        lost = int((~np.isfinite(self.recorded) & ~np.isfinite(self.again)).sum())
        if header["complete_step"]:
            lines.append(
                f"largest relative difference of {known} figures: {self.difference:.2g}; {lost} are not finite in both"
            )
        lines.append(f"loss: {self.loss:.6g} (recorded: {self._recorded_loss():.6g})")
        if self.rows is not None:
            lines += ["", f"rows of the batch of step {self.rows.step}, at the input of {self.rows.layer}:"]
            lines += [*table_of(self.rows), self.rows.sentence]
        return "\n".join(lines)

    def _recorded_loss(self) -> float:
        steps = self.dump.history["@steps"].tolist()
        step = self.dump.header["step"]
        return float(self.dump.history["loss"][steps.index(step)]) if step in steps else float("nan")

    def _worth_a_look(self) -> list[tuple[int, int]]:
        """Return the layer that the dump names, the first one that is not finite, and one statistic of the others."""
        named = self.dump.header.get("layer", "")
        broken = ~np.isfinite(self.again) & ~(np.isnan(self.recorded) & np.isnan(self.again))
        first = [int(i) for i in np.flatnonzero(broken.any(1))[:1]]
        full = [self.layers.index(named)] if named in self.layers else first or [0]
        shown = [(i, k) for i in full for k in range(len(self.statistics))]
        statistic = self.dump.header.get("onset", {}).get("statistic", "")
        column = self.statistics.index(statistic) if statistic in self.statistics else 0
        return shown + [(i, column) for i in range(len(self.layers)) if i not in full][:_SHOWN]


def replay(
    dump: Dump, model: nn.Module | None = None, loss: LossOfBatch | None = None, *, device: str = "cpu",
    checkpoint: Mapping[str, Any] | None = None,
) -> Replayed:  # fmt: skip
    """Run the step of a dump again, with the weights, the random states and the batch that it had.

    Args:
        dump: the dump.
        model: the model, with any weights. Default: a LightningModule is built as it was, from its hyperparameters.
        loss: the loss of a batch, for the statistics of gradients. Default: ``training_step`` of a LightningModule,
            else the "loss" in what the model returns, as Hugging Face's models do, else none.
        device: where to run it. Default: "cpu".
        checkpoint: a state dict, if the dump has no weights. Default: the dump's.

    Raises:
        StabNormError: the dump has no batch or no weights, or the model cannot be built.
    """
    header, step = dump.header, dump.step
    if not step:
        raise StabNormError(
            f"{dump.folder} has no step that can be run again: {header['no_batch'] or header['no_weights']}"
        )
    weights = checkpoint or dump.weights
    if not weights:
        raise StabNormError(
            f"{dump.folder} has no weights: {header['no_weights']}. Give a checkpoint of that step, with --checkpoint"
        )
    if model is None:
        model = build(dump)
    load_weights(model, weights)
    model.to(device)
    training = set(step["training"])
    for name, module in model.named_modules():
        module.training = name in training
    compute = loss or loss_of(model)
    known = [name for name in header["statistics"] if name in CATALOGUE]
    layers = [f"^{re.escape(name)}$" for name in header["layers"]]
    monitor = StabilityMonitor(model, known, include=layers, sync=False)
    monitor.mute()
    if known == list(header["statistics"]) and list(monitor.layers) == list(header["layers"]):
        monitor.load_baselines(step["monitor"])

    micro_batches = int(header.get("micro_batches", 1))

    def run(one: Mapping[str, Any]) -> Tensor | None:
        restore_random_state(one["random"])
        batch, masks = moved((one["batch"], tuple(one["masks"])), torch.device(device))
        with contextlib.ExitStack() as contexts:
            if masks:
                contexts.enter_context(valid_tokens(*masks))
            if header.get("autocast"):
                contexts.enter_context(torch.autocast(device, getattr(torch, header["autocast"])))
            value = loss_in(run_batch(model, batch)) if compute is None else compute(model, batch)
            return None if value is None else value / micro_batches

    total, has_loss = 0.0, False
    with monitor:
        for one in step["batches"]:
            value = run(one)
            if value is not None:
                value.backward()
                has_loss = True
                total += float(value.detach())
        monitor.step()
        history = monitor.history()
    again = torch.stack([history[name][-1] for name in known], -1).numpy()
    alarm = step.get("alarm") or {"step": header["step"], "batches": step["batches"]}
    rows = None
    try:
        named = header.get("layer", "")
        past = AgainstPast.read(header["against_past"]) if "against_past" in header else UNKNOWN
        rows = look_at_rows(model, monitor.norms, alarm["batches"], run, step=alarm["step"], named=named, past=past)
    except Exception as error:  # the figures of the step are there all the same
        say("stabnorm: the rows of the batch cannot be compared: %s", cause(error))
    if rows is not None and not rows.guilty and header.get("ranks", 1) > 1:
        others = f"This batch is that of one of {header['ranks']} ranks, so a row of another one may have done it."
        rows = dataclasses.replace(rows, sentence=f"{rows.sentence} {others}")
    return Replayed(
        dump, monitor.layers, tuple(known), _recorded(dump, monitor.layers, known), again,
        total if has_loss else float("nan"), rows,
    )  # fmt: skip


def _recorded(dump: Dump, layers: tuple[str, ...], statistics: list[str]) -> npt.NDArray[np.float32]:
    steps, step = dump.history["@steps"].tolist(), dump.header["step"]
    recorded = np.full((len(layers), len(statistics)), np.nan, np.float32)
    if dump.header["complete_step"] and step in steps:
        columns = {name: i for i, name in enumerate(dump.header["layers"])}
        for k, name in enumerate(statistics):
            row = dump.history[name][steps.index(step)]
            recorded[:, k] = [row[columns[layer]] for layer in layers]
    return recorded


def load_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load a state dict into the model, in the dtypes that the weights have.

    Raises:
        StabNormError: it is of another model.
    """
    state = weights.get("state_dict", weights)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name in state and value.dtype != state[name].dtype:
            value.data = value.data.to(state[name].dtype)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise StabNormError(f"the weights of the dump do not fit {type(model).__name__}: {error}") from error


def build(dump: Dump) -> nn.Module:
    """Build the LightningModule of a dump from its hyperparameters.

    Raises:
        StabNormError: the dump does not say how.
    """
    recipe = dump.header.get("model") or {}
    if "class" not in recipe:
        why = f": {recipe['unknown']}" if "unknown" in recipe else ""
        raise StabNormError(
            f"the dump does not say how the model is built{why}. Name a function without arguments that returns it: "
            "--model package.module:function"
        )
    try:
        module = import_from(recipe["module"], recipe.get("file"))
        cls: Any = module
        for part in recipe["class"].split("."):
            cls = getattr(cls, part)
        made: Any = cls(**recipe["hyperparameters"])
        if hasattr(made, "configure_model"):
            made.configure_model()
    except Exception as error:
        raise StabNormError(
            f"{recipe['class']} of {recipe['module']} cannot be built from its hyperparameters "
            f"({type(error).__name__}: {error}). Name a function without arguments that returns the model: "
            "--model package.module:function"
        ) from error
    if not isinstance(made, nn.Module):
        raise StabNormError(f"{recipe['class']} is no module. Give --model package.module:function")
    return made


def import_from(name: str, file: str | None) -> Any:
    """Import a module by name, or a script from its file."""
    if file is None:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no module of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def loss_in(output: Any) -> Tensor | None:
    """Return the loss that a model returns in its output; None if it returns none."""
    loss = output.get("loss") if isinstance(output, Mapping) else None
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def loss_of(model: nn.Module) -> LossOfBatch | None:
    """Return what computes the loss of a LightningModule's batch; None for another model."""
    if not hasattr(model, "training_step"):
        return None

    def training_step(module: Any, batch: Any) -> Tensor | None:
        kept = vars(module)
        kept["log"] = kept["log_dict"] = lambda *_, **__: None
        try:
            takes_index = module.training_step.__code__.co_argcount > 2
            output = module.training_step(*((batch, 0) if takes_index else (batch,)))
        except RuntimeError as error:
            if "Trainer" not in str(error):
                raise
            raise StabNormError(
                f"training_step of {type(module).__name__} asks its Trainer, and there is none ({error}). Name a "
                "function of (model, batch) that returns the loss: --loss package.module:function"
            ) from error
        finally:
            del kept["log"], kept["log_dict"]
        value: Tensor | None = output["loss"] if isinstance(output, Mapping) else output
        return value

    return training_step
