"""`remove_norms`: measure, fit, repair, decide and fold, on copies of the model."""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from stabnorm._models.batches import Forward, batches_of
from stabnorm._models.copies import copied
from stabnorm._models.devices import device_of
from stabnorm._models.examples import Example, first_rows
from stabnorm._models.hooks import hooked
from stabnorm._models.masks import MaskOfBatch
from stabnorm._models.random_state import random_state_kept
from stabnorm._models.tables import aligned
from stabnorm._models.tree import replace_module
from stabnorm._models.wrappers import is_compiled, is_scripted
from stabnorm.convert import check_conversion, check_patterns, convert_norms
from stabnorm.errors import StabNormError
from stabnorm.fit.fit import fit_norms
from stabnorm.fit.measure import Measure, measure_norms
from stabnorm.fit.sums import Affine
from stabnorm.fit.watch import Runner
from stabnorm.fold import FoldResult, fold_norms
from stabnorm.nn.prep import PRepBN
from stabnorm.norms import NormLayer, NormSearch
from stabnorm.pretrained.decide import HeldOut, costs_of, fewest_kept, keep_only
from stabnorm.pretrained.repair import Distance, Recipe, Repair, relative_error, repair_norms
from stabnorm.switch.lam import progressive_norms

ROWS = 4  # of a batch to fold on
HELD_OUT = 4  # one of so many batches, where none are given
Fit = Literal["norms", "tables", "layers"]
TAKING_PART: dict[Fit, tuple[str, ...]] = {"norms": (), "tables": ("embedding",), "layers": ("embedding", "linear")}


@dataclass(frozen=True)
class RemovedNorm:
    """What became of one norm.

    Args:
        name: its name in the model.
        residual: affine residual in the original: the share of its output's variance, mean over channels, that no
            affine map per channel reproduces. NaN where it was not measured.
        left: the same of the fit in its turn, when what it reads is the converted model's; NaN where it was not fitted.
        cost: by how much the held-out error would fall were this norm alone put back; NaN without held-out batches.
        kept: whether it is in `RemovalResult.model` as it was.
        reason: why it is kept; where it went, if it is gone.
    """

    name: str
    residual: float
    left: float
    cost: float
    kept: bool
    reason: str


@dataclass(frozen=True)
class RemovalResult:
    """A model without norms, and what became of each; printed, a table.

    Args:
        model: the converted model in eval mode, folded.
        norms: one entry for each norm, in module order.
        error: the mean of `loss` on the held-out batches, before folding; NaN without them.
        losses: of the repair, step by step.
        fold: what folding did; None where every norm is kept.
    """

    model: nn.Module
    norms: list[RemovedNorm]
    error: float
    losses: list[float]
    fold: FoldResult | None

    def __str__(self) -> str:
        gone = sum(not norm.kept for norm in self.norms)
        error = "" if math.isnan(self.error) else f"; held-out error {self.error:.3g}"
        rows: list[tuple[str, ...]] = [("norm", "", "residual", "left", "cost", "")]
        for norm in self.norms:
            numbers = ["" if math.isnan(x) else f"{x:.3f}" for x in (norm.residual, norm.left)]
            cost = "" if math.isnan(norm.cost) else f"{norm.cost:+.1e}"
            rows.append((norm.name, "kept" if norm.kept else "gone", *numbers, cost, norm.reason))
        return "\n".join([f"{gone} of {len(self.norms)} norms removed{error}", *aligned(rows, indent=2)])


def remove_norms(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    steps: int = 0,
    tolerance: float | None = None,
    keep: str | Sequence[str] | None = None,
    loss: Distance | None = None,
    held_out: Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    fit: Fit | None = None,
    fit_batches: int = 32,
    forward: Forward | None = None,
    mask: MaskOfBatch = None,
    progress: bool = False,
) -> RemovalResult:
    r"""Take LayerNorm and RMSNorm out of a trained model: no labels, and nothing known of its task.

    Each norm becomes one affine map per channel, y = a x + b, fitted by least squares to what the original's norm
    writes, in depth order (`stabnorm.fit.fit`). With `steps`, the whole model is then trained until its hidden
    states and its output are the original's again (`stabnorm.pretrained.repair`). With `tolerance`, norms stay, worst
    first, until the output is close enough on held-out batches. At the end the affine maps are folded into the weights
    around them (`fold_norms`). All of this happens to copies, in eval mode.

    .. math:: \min_{a_c, b_c} \sum_t (a_c x_{tc} + b_c - \hat y_{tc})^2

    Which norms take to it: those with a small affine residual. Tokens of very different scale make it large, and only
    a repair that trains the other weights, too, makes up for these.

    Args:
        model: trained, on any device; three copies of it fit there. With several processes all of them call this, each
            with batches of its own.
        loader: a DataLoader or a list of batches like those the model is for. A tensor is the model's input, a tuple or
            list is ``(input, targets, ...)`` of which the targets are not used, a mapping holds keyword arguments.
        steps: optimizer steps of the repair. Default: 0, only the fit.
        tolerance: the largest mean of `loss` on the held-out batches. If even the repaired model is beyond it, norms
            are put back into it; if that is not enough, the repair is given up, and norms stay in a fit of the
            original. 0: nothing changes. Default: None, every norm goes.
        keep: regular expression, or several, searched for in the names of norms that stay whatever happens.
            Default: none.
        loss: how far an output is from the original's, ``loss(output, original_output)``, a scalar tensor, 0 for equal
            ones; the repair adds it to the distance of the hidden states. Default: the relative squared error,
            ||y - y'||^2 / ||y'||^2, of each floating tensor in the output.
        held_out: batches for `tolerance`. Default: a quarter of `fit_batches`, the loader's first, which then are
            neither fitted to nor trained on.
        recipe: how to repair. Default: `Recipe()`.
        fit: "norms" fits the affine maps only; "tables" with them the embedding tables that a norm alone reads;
            "layers" the linear layer before a post-norm, too, see `stabnorm.fit.feed`. Default: "layers", the
            closest; with a repair "tables", from which it ends closer to the original.
        fit_batches: how many of the loader's batches to fit to; they are kept in memory. Default: 32.
        forward: how a batch is run, ``forward(model, batch)``, with the batch on the model's device. Default: as the
            format of `loader` says.
        mask: which tokens are valid: a key of the batch, an index, or a function of the batch. Default:
            "attention_mask" where the batch is a mapping that has it.
        progress: print the norms as they were measured, and show a bar for the repair. Default: False.

    Returns:
        The model, and for each norm whether it is gone and what that cost; see `RemovalResult`.

    Raises:
        TypeError: the model's norms cannot be converted with these arguments.
        ValueError: an argument is out of range, `keep` matches no norm, or the loader gives its batches only once.
        StabNormError: there is no norm to remove, the loader is empty, the model does not run on its batches, is
            compiled, scripted or wrapped for several processes, or the repair's loss is not finite. The model is what
            it was in each case.

    The method is ours. Before it, LayerNorm was taken out of GPT-2 by freezing one scalar per norm, in an order made by
    hand, and fine-tuning on the task's own loss (`submarat/removing-layer-norm`).

    >>> from stabnorm import remove_norms
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> result = remove_norms(model, [torch.randn(64, 4) for _ in range(4)])
    >>> [(norm.name, norm.kept, norm.reason) for norm in result.norms]
    [('1', False, 'forward, into 2')]
    >>> result.model[1]
    FoldedNorm()
    """
    _check(model, steps, tolerance, fit, fit_batches)
    every = NormSearch(model)
    check_patterns(model, every, keep=keep)
    device = device_of(model)
    with random_state_kept(device):
        run, distance = Runner(forward, mask), loss or relative_error
        fitted = list(batches_of(loader, fit_batches))
        judged: list[Any] = []
        training: Iterable[Any] = loader
        if tolerance is not None and held_out is not None:
            judged = list(batches_of(held_out))
        elif tolerance is not None:
            judged, fitted, training = _split(loader, fitted, steps)
        work = _Removal(model, every, keep, run, fitted, fit or ("tables" if steps else "layers"), progress)
        held = HeldOut(work.original, judged, run, distance) if judged else None
        losses: list[float] = []
        if tolerance == 0:
            kept = dict.fromkeys(work.norms, "tolerance=0 leaves everything as it is")
        else:
            kept = work.fit()
            if steps:
                losses = work.repair(steps, recipe, distance, training)
            if tolerance is not None and held is not None:
                kept |= work.decide(tolerance, held, bool(steps))
        return work.result(kept, held, losses)


class _Removal:
    """The copies that are worked on, and what is known about their norms so far."""

    def __init__(
        self,
        model: nn.Module,
        every: NormSearch,
        keep: str | Sequence[str] | None,
        run: Runner,
        fitted: list[Any],
        fit: Fit,
        progress: bool,
    ) -> None:
        self.user_model, self.keep, self.run, self.fitted = model, keep, run, fitted
        self.kind, self.progress = fit, progress
        self.original = copied(model).eval().requires_grad_(False)
        self.paths = {
            layer.name: path for path, m in model.named_modules() for layer in every.found if m is layer.module
        }
        layers = [layer for layer in NormSearch(self.original).found if layer.kind in ("layer", "rms")]
        self.measure = measure_norms(self.original, layers, fitted, run)
        if progress:
            print(describe(self.measure))
        self.every: list[NormLayer] = every.found
        self.costs: dict[str, float] = {}
        self._begin()

    def _begin(self) -> None:
        """A converted copy in which every norm is what it was."""
        self.model = copied(self.user_model).eval()
        report = convert_norms(self.model, exclude=self.keep, center=True, filtration=None)
        self.norms: dict[str, PRepBN] = {
            name: norm for name, norm in progressive_norms(self.model).items() if name in report.converted
        }
        self.left = report.left
        self.fits: dict[str, Affine | str] = {}

    def fit(self, stay: Sequence[str] = ()) -> dict[str, str]:
        """Fit all norms but these, on top of nothing; which could not be fitted, and why."""
        if self.fits:
            self._begin()
        wanted = [name for name in self.norms if name not in stay]
        levels = [[name for name in level if name in wanted] for level in self.measure.levels]
        levels = [level for level in levels if level]
        found = self.measure.feeders.items()
        feeders = {name: feeder for name, feeder in found if feeder.kind in TAKING_PART[self.kind]}
        fits = fit_norms(self.model, self.original, self.fitted, levels, self.run, self.measure.calls, feeders)
        self.fits |= fits
        failed = {name: fit for name, fit in fits.items() if isinstance(fit, str)}
        failed |= {name: "it did not run on these batches" for name in wanted if name not in fits}
        keep_only(self.norms, [*stay, *failed])
        return failed

    def repair(self, steps: int, recipe: Recipe | None, distance: Distance, training: Iterable[Any]) -> list[float]:
        """Train the fitted model; nothing happens where no norm could be fitted."""
        if all(bool(norm.lam) for norm in self.norms.values()):
            return []
        repair = Repair(self.model, self.original, steps, recipe, distance, self.run)
        return repair_norms(repair, training, progress=self.progress)

    @property
    def gone(self) -> list[str]:
        return [name for name, norm in self.norms.items() if not norm.lam]

    def decide(self, tolerance: float, held: HeldOut, repaired: bool) -> dict[str, str]:
        """Put norms back until the tolerance holds; which ones, and why."""
        found = held.error(self.model)
        self.costs = costs_of(self.norms, self.gone, self.model, held)
        if found <= tolerance:
            return {}
        failed = [name for name in self.norms if name not in self.gone]
        order = sorted(self.gone, key=lambda name: -self.costs[name])

        def back_in_place(stay: list[str]) -> float:
            keep_only(self.norms, [*failed, *stay])
            return held.error(self.model)

        def fitted_anew(stay: list[str]) -> float:
            self.fit([*failed, *stay])
            return held.error(self.model)

        why = f"without it the held-out error is above {tolerance:g}"
        if repaired:
            stay = fewest_kept(order, back_in_place, tolerance)
            if back_in_place(stay) <= tolerance:
                return dict.fromkeys(stay, why)
            self._begin()  # the other weights have moved too far
            why += ", with the repair and without"
        stay = fewest_kept(order, fitted_anew, tolerance)
        self.fit([*failed, *stay])
        return dict.fromkeys(stay, why)

    def result(self, kept: dict[str, str], held: HeldOut | None, losses: list[float]) -> RemovalResult:
        """Put what is kept back as it was, and fold the rest."""
        keep_only(self.norms, kept)
        error = held.error(self.model) if held else math.nan
        user = dict(self.user_model.named_modules())
        for name in kept:
            old = copy.deepcopy(user[self.paths[name]]).eval()
            trained = dict(self.norms[name].named_parameters())
            with torch.no_grad():
                for parameter_name, parameter in old.named_parameters():
                    parameter.copy_(trained[parameter_name])
            replace_module(self.model, self.paths[name], old)
        fold = None
        if len(kept) < len(self.norms):
            example = first_rows(_called_with(self.model, self.fitted[0], self.run), ROWS)
            fold = fold_norms(self.model, (example.args, example.kwargs), inplace=True)
        return RemovalResult(self.model, self._report(kept, fold), error, losses, fold)

    def _report(self, kept: dict[str, str], fold: FoldResult | None) -> list[RemovedNorm]:
        went = {norm.name: norm for norm in fold.norms} if fold else {}
        norms = []
        for layer in self.every:
            name = layer.name
            fit = self.fits.get(name)
            site = went.get(self.paths[name])
            gone = site is not None and site.status != "kept"
            where = "" if site is None else ". ".join(filter(None, [", ".join(site.into), site.reason]))
            reason = kept.get(name) or self._asked_to_keep(name) or self.left.get(name, "")
            if gone and site is not None:
                reason = f"{site.status}, into {where}" if site.into else f"{site.status}: {where}"
            norms.append(
                RemovedNorm(
                    name,
                    self.measure.residuals.get(name, math.nan),
                    fit.residual if isinstance(fit, Affine) else math.nan,
                    self.costs.get(name, math.nan),
                    not gone,
                    reason,
                )
            )
        return norms

    def _asked_to_keep(self, name: str) -> str:
        known = name in self.norms or name in self.left
        return "" if known else f"keep={self.keep!r} says so"


def describe(measure: Measure) -> str:
    """The norms as they were measured, in the order of their depth; printed before anything is done."""
    rows = [("level", "norm", "residual")]
    for number, level in enumerate(measure.levels):
        rows += [(str(number), name, f"{measure.residuals[name]:.3f}") for name in level]
    return "\n".join(aligned(rows, indent=2))


# --- what is wrong with the call ---


def _check(model: nn.Module, steps: int, tolerance: float | None, fit: str | None, fit_batches: int) -> None:
    if fit is not None and fit not in TAKING_PART:
        raise ValueError(f"fit={fit!r} is unknown. Choose one of {', '.join(map(repr, TAKING_PART))}")
    if steps < 0:
        raise ValueError(f"steps={steps} is no number of steps. Use 0 for no repair")
    if fit_batches < 1:
        raise ValueError(f"fit_batches={fit_batches} is nothing to fit to. Use 1 or more")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} is no distance. Use 0 or more, or None to remove every norm")
    check_conversion(model, "prepbn", {})
    for name, module in model.named_modules():
        if is_scripted(module) or is_compiled(module):
            how = "scripted" if is_scripted(module) else "compiled"
            raise StabNormError(f"{name or 'the model'} is {how}, so its norms cannot be replaced. Do that afterwards")


def _split(loader: Iterable[Any], read: list[Any], steps: int) -> tuple[list[Any], list[Any], Iterable[Any]]:
    """Of the batches that were read, those to judge on and those to fit to; and what to train on."""
    if len(read) < 2:
        raise ValueError("the loader has one batch, which cannot be fitted to and judged on. Pass held_out=")
    sampler = getattr(loader, "sampler", None)
    if steps and isinstance(sampler, torch.utils.data.RandomSampler):
        raise ValueError(
            "the loader shuffles, so that the batches to judge on would be trained on in another pass. Pass held_out="
        )
    count = max(1, len(read) // HELD_OUT)
    return read[:count], read[count:], _After(loader, count)


class _After:
    """A loader without its first batches."""

    def __init__(self, loader: Iterable[Any], count: int) -> None:
        self._loader, self._count = loader, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._loader), self._count, None)


def _called_with(model: nn.Module, batch: Any, run: Runner) -> Example:
    """The arguments that a batch comes to."""
    seen: list[Example] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Example(args, kwargs))

    with hooked([model.register_forward_pre_hook(note, with_kwargs=True)]), torch.no_grad():
        run(model, batch)
    return seen[0]
