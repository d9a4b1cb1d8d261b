"""`remove_norms`: measure, fit, repair, decide and fold, on copies of the model."""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from stabnorm._checks import (
    check_choice,
    check_count,
    check_flag,
    check_function,
    check_has_numbers,
    check_instance,
    check_loader,
    check_number,
)
from stabnorm._log import printable
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
from stabnorm.pretrained.decide import Estimate, HeldOut, costs_of, fewest_kept, keep_only
from stabnorm.pretrained.repair import Distance, Recipe, Repair, relative_error, repair_norms
from stabnorm.switch.lam import progressive_norms

ROWS = 4  # rows of a batch that are the example of the fold
HELD_OUT = 4  # one batch out of so many is held out if the caller gives none
Fit = Literal["norms", "tables", "layers"]
FITTED_FEEDERS: dict[Fit, tuple[str, ...]] = {"norms": (), "tables": ("embedding",), "layers": ("embedding", "linear")}


@dataclass(frozen=True)
class RemovedNorm:
    """What became of one norm.

    Args:
        name: its name in the model.
        residual: the affine residual in the original: the share of the norm's output variance that no affine map per
            channel reproduces, as a mean over channels. NaN if it was not measured.
        left: the same share for the fit, whose input comes from the converted model. NaN if the norm was not fitted.
        cost: by how much the held-out error would fall if this norm alone was put back. NaN without held-out batches.
        kept: whether `RemovalResult.model` still has the norm.
        reason: why the norm is kept, or into which layers its affine map was folded.
    """

    name: str
    residual: float
    left: float
    cost: float
    kept: bool
    reason: str


@dataclass(frozen=True)
class RemovalResult:
    """The model without norms, and what became of each norm. `str` gives a table.

    Args:
        model: the converted and folded model, in eval mode.
        norms: one entry for each norm, in module order.
        error: the mean of `loss` on the held-out batches, before the fold. NaN without held-out batches.
        interval: the 95 % confidence interval of `error` by Student's t over the batches. NaN for fewer than two.
        losses: the loss of each step of the repair.
        fold: the result of the fold; None if every norm is kept.
    """

    model: nn.Module
    norms: list[RemovedNorm]
    error: float
    losses: list[float]
    fold: FoldResult | None
    interval: tuple[float, float] = (math.nan, math.nan)

    def __str__(self) -> str:
        gone = sum(not norm.kept for norm in self.norms)
        error = "" if math.isnan(self.error) else f"; held-out error {self.error:.3g}"
        if not math.isnan(self.interval[0]):
            error += f" (95 % interval {self.interval[0]:.3g} to {self.interval[1]:.3g})"
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
    r"""Remove LayerNorm and RMSNorm from a trained model, without labels and without knowledge of its task.

    Each norm becomes one affine map per channel, y = a x + b. In depth order, least squares fit it to the output of the
    norm in the original model (`stabnorm.fit.fit`). With `steps`, the whole model is then trained until it reproduces
    the hidden states and the output of the original (`stabnorm.pretrained.repair`). With `tolerance`, norms stay, worst
    first, until the output is close enough on held-out batches. At the end `fold_norms` folds the affine maps into the
    weights around them. All of this is done to copies, in eval mode; `model` does not change.

    .. math:: \min_{a_c, b_c} \sum_t (a_c x_{tc} + b_c - \hat y_{tc})^2

    This works well for norms with a small affine residual. The residual is large when tokens have very different
    scales. Only a repair that also trains the other weights makes up for that.

    Args:
        model: the trained model, on a device that has memory for three copies of it. With several processes, all of
            them call this function, each one with batches of its own.
        loader: a DataLoader or a list of batches like those that the model is for. A tensor is the model's input, a
            tuple or list is ``(input, targets, ...)`` whose targets are not used, and a mapping holds keyword
            arguments.
        steps: optimizer steps of the repair. Default: 0, only the fit.
        tolerance: the largest mean of `loss` on the held-out batches that is allowed. If the repaired model is above
            it, norms are put back into that model. If this is not enough, the repair is dropped, and norms stay in a
            new fit of the original. With 0 every norm stays. Default: None, every norm is removed.
        keep: regular expression, or several, that are searched for in norms' names; these norms stay in any case.
            Default: none.
        loss: the distance of an output from the original's, ``loss(output, original_output)``: a scalar tensor that is
            0 for equal outputs. The repair adds it to the distance of the hidden states. Default: the relative squared
            error, ||y - y'||^2 / ||y'||^2, of each floating tensor in the output.
        held_out: batches for `tolerance`. Default: the loader's first batches, a quarter of `fit_batches`; these are
            then neither fitted to nor trained on.
        recipe: how to repair. Default: `Recipe()`.
        fit: what is fitted. "norms": the affine maps. "tables": also the embedding tables whose sum only a norm reads.
            "layers": also the linear layer before a post-norm, see `stabnorm.fit.feed`. Default: "layers", which comes
            closest to the original; with a repair "tables", because the repair then ends closer.
        fit_batches: how many of the loader's batches are used for the fit; they are kept in memory. Default: 32.
        forward: how a batch is run, ``forward(model, batch)``, with the batch on the model's device. Default: according
            to the format of `loader`.
        mask: which tokens are valid: a key, an attribute or an index of the batch, or a function of it.
            Default: "attention_mask" if the batch is a mapping that has this key.
        progress: print the measured norms, and show a progress bar for the repair. Default: False.

    Returns:
        The new model, and for each norm whether it was removed and what that cost; see `RemovalResult`.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range, `keep` matches no norm, or the loader gives its batches only once.
        StabNormError: there is no norm to remove, the loader is empty, the model does not run on its batches, is
            compiled, scripted or wrapped for several processes, or the loss of the repair is not finite.

    The method is our own. An earlier one removed LayerNorm from GPT-2: it froze one scalar per norm, in an order chosen
    by hand, and fine-tuned on the loss of the task (`submarat/removing-layer-norm`).

    >>> from stabnorm import remove_norms
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> result = remove_norms(model, [torch.randn(64, 4) for _ in range(4)])
    >>> [(norm.name, norm.kept, norm.reason) for norm in result.norms]
    [('1', False, 'forward, into 2')]
    >>> result.model[1]
    FoldedNorm()
    """
    _check(model, steps, tolerance, fit, fit_batches)
    check_loader("loader", loader)
    if held_out is not None:
        check_loader("held_out", held_out)
        if tolerance is None:
            raise ValueError("held_out= would not be used: it is what tolerance= is judged on. Give a tolerance, too")
    if loss is not None:
        check_function("loss", loss, "output", "original_output")
    if recipe is not None:
        check_instance("recipe", recipe, Recipe, "a Recipe, such as Recipe(lr=1e-4)")
    check_flag("progress", progress)
    run = Runner(forward, mask)
    every = NormSearch(model)
    check_patterns(model, every, keep=keep)
    device = device_of(model)
    with random_state_kept(device), torch.inference_mode(False):
        distance = loss or relative_error
        fitted = list(batches_of(loader, fit_batches))
        judged: list[Any] = []
        training: Iterable[Any] = loader
        if tolerance is not None and held_out is not None:
            judged = list(batches_of(held_out))
        elif tolerance is not None:
            judged, fitted, training = _split(loader, fitted, steps)
        removal = _Removal(model, every, keep, run, fitted, fit or ("tables" if steps else "layers"), progress)
        held = HeldOut(removal.original, judged, run, distance) if judged else None
        losses: list[float] = []
        if tolerance == 0:
            kept = dict.fromkeys(removal.norms, "tolerance=0 leaves everything as it is")
        else:
            kept = removal.fit()
            if steps:
                losses = removal.repair(steps, recipe, distance, training)
            if tolerance is not None and held is not None:
                kept |= removal.decide(tolerance, held, bool(steps))
        return removal.result(kept, held, losses)


class _Removal:
    """The copies that `remove_norms` changes, and what it knows about their norms so far."""

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
        """Start from a new converted copy, in which every norm still normalises (lam = 1)."""
        self.model = copied(self.user_model).eval()
        report = convert_norms(self.model, exclude=self.keep, center=True, filtration=None)
        self.norms: dict[str, PRepBN] = {
            name: norm
            for name, norm in progressive_norms(self.model).items()
            if name in report.converted and isinstance(norm, PRepBN)
        }
        self.left = report.left
        self.fits: dict[str, Affine | str] = {}

    def fit(self, stay: Sequence[str] = ()) -> dict[str, str]:
        """Refit all norms except these, from scratch; return those that could not be fitted, with the reason."""
        if self.fits:
            self._begin()
        wanted = [name for name in self.norms if name not in stay]
        levels = [[name for name in level if name in wanted] for level in self.measure.levels]
        levels = [level for level in levels if level]
        kinds = FITTED_FEEDERS[self.kind]
        feeders = {name: feeder for name, feeder in self.measure.feeders.items() if feeder.kind in kinds}
        fits = fit_norms(self.model, self.original, self.fitted, levels, self.run, self.measure.calls, feeders)
        self.fits |= fits
        failed = {name: fit for name, fit in fits.items() if isinstance(fit, str)}
        failed |= {name: "it did not run on these batches" for name in wanted if name not in fits}
        keep_only(self.norms, [*stay, *failed])
        return failed

    def repair(self, steps: int, recipe: Recipe | None, distance: Distance, training: Iterable[Any]) -> list[float]:
        """Train the fitted model; do nothing if no norm could be fitted."""
        if all(bool(norm.lam) for norm in self.norms.values()):
            return []
        repair = Repair(self.model, self.original, steps, recipe, distance, self.run)
        return repair_norms(repair, training, progress=self.progress)

    @property
    def gone(self) -> list[str]:
        return [name for name, norm in self.norms.items() if not norm.lam]

    def decide(self, tolerance: float, held: HeldOut, repaired: bool) -> dict[str, str]:
        """Put norms back until the tolerance holds; return these norms, with the reason."""
        error = held.error(self.model)
        self.costs = costs_of(self.norms, self.gone, self.model, held)
        if error <= tolerance:
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
        """Replace the kept norms by the original modules, and fold the others."""
        keep_only(self.norms, kept)
        error = held.estimate(self.model) if held else Estimate(math.nan, math.nan, math.nan)
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
        return RemovalResult(self.model, self._report(kept, fold), error.mean, losses, fold, (error.low, error.high))

    def _report(self, kept: dict[str, str], fold: FoldResult | None) -> list[RemovedNorm]:
        folded = {norm.name: norm for norm in fold.norms} if fold else {}
        norms = []
        for layer in self.every:
            name = layer.name
            fit = self.fits.get(name)
            site = folded.get(self.paths[name])
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
    """Return a table of the measured norms in depth order, which is printed before anything is changed."""
    rows = [("level", "norm", "residual")]
    for number, level in enumerate(measure.levels):
        rows += [(str(number), name, f"{measure.residuals[name]:.3f}") for name in level]
    return "\n".join(aligned(rows, indent=2))


# --- what is wrong with the call ---


def _check(model: nn.Module, steps: int, tolerance: float | None, fit: str | None, fit_batches: int) -> None:
    if fit is not None:
        check_choice("fit", fit, tuple(FITTED_FEEDERS))
    check_count("steps", steps, 0, hint=": 0 is no repair")
    check_count("fit_batches", fit_batches)
    if tolerance is not None:
        check_number("tolerance", tolerance, least=0, hint=", or None to remove every norm")
    check_conversion(model, "prepbn", {})
    check_has_numbers(model, "to fit to")
    for name, module in model.named_modules():
        if is_scripted(module) or is_compiled(module):
            how = "scripted" if is_scripted(module) else "compiled"
            what = printable(name) or "the model"
            raise StabNormError(f"{what} is {how}, so its norms cannot be replaced. Do that afterwards")


def _split(loader: Iterable[Any], read: list[Any], steps: int) -> tuple[list[Any], list[Any], Iterable[Any]]:
    """Split the batches that were read into those to judge on and those to fit to; also return the training batches."""
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
    """Return the arguments with which the model is called on a batch."""
    seen: list[Example] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Example(args, kwargs))

    with hooked([model.register_forward_pre_hook(note, with_kwargs=True)]), torch.no_grad():
        run(model, batch)
    return seen[0]
