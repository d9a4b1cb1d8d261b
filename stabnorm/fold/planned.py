"""`plan_fold`: what switching and folding would do to a model, before anything is trained."""

import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from stabnorm._models.ambient import plain_context
from stabnorm._models.copies import copied
from stabnorm._models.devices import device_of
from stabnorm._models.examples import Example, read_examples, run
from stabnorm._models.hooks import hooked
from stabnorm._models.random_state import random_state_kept
from stabnorm._models.tables import aligned
from stabnorm._models.tree import Tree
from stabnorm._surgery import Target, plan_conversion
from stabnorm.convert import check_conversion
from stabnorm.errors import StabNormError
from stabnorm.fold._lanes import run_checked
from stabnorm.fold.fold import check_model, check_options, fold_norms
from stabnorm.fold.result import FOLDED, FoldedSite, counts_of
from stabnorm.monitor.catalogue.affinity import AFFINE_RESIDUAL
from stabnorm.monitor.monitor import StabilityMonitor
from stabnorm.nn._channel_norm import ChannelNorm
from stabnorm.nn._progressive import ProgressiveNorm
from stabnorm.norms import NormLayer, find_norms
from stabnorm.recalibrate import recalibrate_norms

ROUNDS = 5  # timed forwards
AFFINE = 0.30  # residuals below are those of norms that can be switched: `stabnorm.switch.AffineGate`
FEW = 100  # tokens: on fewer, chance alone explains a hundredth of any norm's output


@dataclass(frozen=True)
class PlannedNorm(FoldedSite):
    """What would become of one norm; see `FoldedSite` for the rest.

    Args:
        kind: What it is now: "layer", "rms", "batch", "group", "instance", "affine" for a module of which only its
            `fold_affine` is known, or "unknown" for one that normalises in a way that was not understood.
        affine_residual: What switching it would lose: the share of its output that no affine map per channel
            reproduces, in [0, 1]. NaN for a norm that did not run, and for one that is no layer or rms norm.
        tokens: The number of tokens this was measured on. With N tokens it reads up to about 1 / (N - 1) too low.
        share: Its share of the time of a forward; NaN for a norm that did not run, or is unknown.
    """

    kind: str = "affine"
    affine_residual: float = float("nan")
    tokens: int = 0
    share: float = float("nan")


@dataclass(frozen=True)
class FoldPlan:
    """What switching and folding would do; printed, it is a table.

    Args:
        norms: One entry for each norm, in module order.
        to: What the layer and rms norms were switched to.
        seconds: How long a forward takes on all examples: eager, in eval mode, where the model is.
    """

    norms: list[PlannedNorm]
    to: Target
    seconds: float

    @property
    def share(self) -> float:
        """The share of a forward's time that is spent in norms which would disappear."""
        return _total(norm.share for norm in self.norms if norm.status in FOLDED)

    @property
    def summary(self) -> str:
        """How many norms would get which status, and what share of a forward would be saved, in one line."""
        every = _total(norm.share for norm in self.norms)
        return (
            f"{len(self.norms)} norms, if switched to {self.to}: {counts_of(self.norms)}; norms take {every:.1%} of a "
            f"forward of {1e3 * self.seconds:.3g} ms, and {self.share:.1%} would go"
        )

    def __str__(self) -> str:
        rows = [("name", "kind", "status", "affine residual", "share", "into, or why not")]
        for norm in self.norms:
            residual = "-" if norm.affine_residual != norm.affine_residual else f"{norm.affine_residual:.3f}"
            share = "-" if norm.share != norm.share else f"{norm.share:.1%}"
            rows.append((norm.name, norm.kind, norm.status, residual, share, ", ".join(norm.into) or norm.reason))
        return "\n".join([self.summary, *aligned(rows), *self._notes()])

    def _notes(self) -> list[str]:
        notes = []
        curved = sum(norm.affine_residual > AFFINE for norm in self.norms)
        if curved:
            notes.append(
                f"{curved} norms have an affine residual above {AFFINE:.2f}: switching these costs accuracy unless it "
                'falls while the model trains. schedule="adaptive" waits for that, and keeps them else'
            )
        fewest = min((norm.tokens for norm in self.norms if norm.tokens), default=FEW)
        if fewest < FEW:
            notes.append(
                f"affine residuals were measured on as few as {fewest} tokens, and read up to about "
                f"{1 / max(fewest - 1, 1):.2f} too low. Pass batches of real data"
            )
        return notes


def plan_fold(
    model: nn.Module,
    example: Any,
    *,
    to: Target = "prepbn",
    residual: bool | Literal["auto"] = True,
    tied: Literal["untie", "refuse"] = "untie",
    outputs: Callable[[Any], Any] | None = None,
    **norm_options: Any,
) -> FoldPlan:
    r"""Say for each norm what switching and folding it would do: where it goes, what that loses, what it gains.

    The model does not change. A copy of it in eval mode is switched as by `convert_norms`, at lam = 0, with running
    statistics from the example, and folded by `fold_norms`, verification included. Norms that are affine already, such
    as BatchNorm, are part of the plan. So a fresh model, a trained one, one in the middle of a switch and one after it,
    in training or in eval mode, all give the plan of what they would be at the end.

    What a switch loses at a norm is its *affine residual* on the model as it is now,

    .. math:: A = 1 - \operatorname{mean}_c \operatorname{corr}_n(x_{n,c}, \mathrm{norm}(x)_{n,c})^2

    the share of the norm's output that no affine map per channel reproduces. What it gains is the norm's share of the
    time of a forward, the median of five, measured around each call in eager mode. Another batch size or device, or a
    compiler, may change that share.

    Args:
        model: any; its norms of all kinds are listed.
        example: as for `fold_norms`. The residuals are as good as the examples are: pass a list of real inputs.
        to: what to switch to, as for `convert_norms`. Default: "prepbn".
        residual: as for `fold_norms`. Default: True.
        tied: as for `fold_norms`. Default: "untie".
        outputs: as for `fold_norms`. Default: all.
        **norm_options: as for `convert_norms`; ``center=False`` often folds further.

    Returns:
        An entry for each norm; see `FoldPlan`.

    Raises:
        TypeError: `example` has none of the formats, `model` is no module, or the target has no such option.
        ValueError: an option is unknown, the example does not run, the model cannot be copied, or has no norm.
        StabNormError: the model is compiled, scripted, without numbers (meta, lazy), wrapped for several processes, or
            itself a norm.

    The method is ours; the residual's bound was found on small models.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> plan = plan_fold(model, torch.randn(256, 4))
    >>> [(norm.name, norm.kind, norm.status, norm.into) for norm in plan.norms]
    [('1', 'layer', 'forward', ('2',))]
    >>> 0 < plan.norms[0].affine_residual < 1, 0 < plan.share < 1, type(model[1]).__name__
    (True, True, 'LayerNorm')
    """
    check_options(residual=residual, tied=tied, outputs=outputs)
    check_model(model, is_eval=False)
    check_conversion(model, to, norm_options)
    examples = read_examples("example", example)
    device = device_of(model)
    with random_state_kept(device), torch.inference_mode(False):
        now = copied(model).eval()
        layers = find_norms(now)  # says which layers look like norms and are not understood; once is enough
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_checked(now, examples, outputs)
            switched = copied(now)
            left = _switch(switched, to, norm_options, examples)
            _measure_statistics(switched, examples)
            folded = fold_norms(switched, example, residual=residual, tied=tied, outputs=outputs, inplace=True).norms
            if not folded:
                raise ValueError(
                    f"{type(model).__name__} has no norm, so there is nothing to plan. If it has norms of its own, "
                    "tell stabnorm with stabnorm.register_norm"
                )
            residuals = _affine_residuals(now, layers, examples)
        seconds, shares = _time(now, [site.name for site in folded], examples, device)
    modules, kinds = dict(now.named_modules()), {id(layer.module): layer.kind for layer in layers}
    norms = []
    for site in folded:
        module = modules[site.name]
        loss, tokens = residuals.get(id(module), (float("nan"), 0))
        reason = left.get(site.name, site.reason) if site.status == "kept" else site.reason
        kind = kinds.get(id(module), "unknown" if site.status == "kept" else "affine")
        share = float("nan") if kind == "unknown" else shares[site.name]  # its forward may be more than the norm
        norms.append(PlannedNorm(site.name, site.status, site.into, reason, kind, loss, tokens, share))
    return FoldPlan(norms, to, seconds)


def _total(shares: Iterable[float]) -> float:
    return sum(share for share in shares if share == share)


# --- as it would be at the end ---


@torch.no_grad()
def _switch(model: nn.Module, to: Target, norm_options: dict[str, Any], examples: Sequence[Example]) -> dict[str, str]:
    """Switch the norms that can be switched, to what they are after the training; say why the others cannot."""
    tree, left = Tree(model), {}
    names = {id(module): name for name, module in model.named_modules()}
    plans = [(layer, plan_conversion(layer, to, norm_options, tree)) for layer in find_norms(model)]
    for layer, plan in plans:
        if plan.carry_out:
            plan.carry_out()
        elif not plan.done_before and layer.kind in ("layer", "rms"):
            left[names[id(layer.module)]] = plan.reason
    if any(layer.any_width for layer, _ in plans):  # their first call tells how many channels they have
        for example in examples:
            run(model, example)
    for module in model.modules():
        if isinstance(module, ProgressiveNorm):
            module.lam.zero_()
        if isinstance(module, ChannelNorm | _BatchNorm):
            _train(module)
    return left


@plain_context()
def _train(norm: nn.Module) -> None:
    """Draw parameters that are all zero: a zero bias folds where no other bias does, and a zero gain nowhere."""
    for parameter in norm.parameters(recurse=False):
        if not bool(parameter.any()):
            parameter.copy_(torch.linspace(0.5, 1.0, parameter.numel()))


def _measure_statistics(model: nn.Module, examples: Sequence[Example]) -> None:
    with suppress(ValueError, StabNormError):  # no norm has running statistics, or none runs
        recalibrate_norms(model, examples, len(examples), forward=run)


# --- what it loses and gains ---


def _affine_residuals(
    model: nn.Module, layers: Sequence[NormLayer], examples: Sequence[Example]
) -> dict[int, tuple[float, int]]:
    """Measure residual and tokens of the layer and rms norms, by their `id`."""
    layer_of = {layer.name: layer for layer in layers if layer.kind in ("layer", "rms")}
    if not layer_of:
        return {}
    watched = [f"^{re.escape(name)}$" for name in layer_of]
    monitor = StabilityMonitor(model, [AFFINE_RESIDUAL], include=watched, gradients=False)
    monitor.count_in_eval()
    with monitor:
        for example in examples:
            run(model, example)
        monitor.step()
    history = monitor.history()
    measured = zip(monitor.layers, history[AFFINE_RESIDUAL][0].tolist(), history["tokens"][0].tolist(), strict=True)
    return {id(layer_of[name].module): (residual, int(tokens)) for name, residual, tokens in measured}


def _time(
    model: nn.Module, names: Sequence[str], examples: Sequence[Example], device: torch.device
) -> tuple[float, dict[str, float]]:
    """Measure the seconds of a forward on all examples, the median, and each norm's share of a forward.

    The shares are those of one forward, the median one, so that they never add up to more than one.
    """
    modules = dict(model.named_modules())
    norms = {name: modules[name] for name in names}
    _seconds(model, norms, examples, device)  # warm up
    whole, parts = [], []
    for _ in range(ROUNDS):  # in turn, so that a busy moment slows both
        whole.append(_seconds(model, {"": model}, examples, device)[""])
        parts.append(_seconds(model, {"": model, **norms}, examples, device))
    middle = sorted(parts, key=lambda part: part[""])[ROUNDS // 2]
    return statistics.median(whole), {name: middle[name] / middle[""] for name in names}


def _seconds(
    model: nn.Module, modules: dict[str, nn.Module], examples: Sequence[Example], device: torch.device
) -> dict[str, float]:
    """Measure the time spent in each of these modules; NaN for a module that did not run."""
    marks: dict[str, list[Any]] = {name: [] for name in modules}

    def marking(name: str) -> Callable[..., None]:
        return lambda *_: marks[name].append(_mark(device))

    def hooks() -> Iterator[RemovableHandle]:
        for name, module in modules.items():
            yield module.register_forward_pre_hook(marking(name))
            yield module.register_forward_hook(marking(name), prepend=True)

    with hooked(hooks()):
        for example in examples:
            run(model, example)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: sum(map(_between, m[::2], m[1::2])) if m else float("nan") for name, m in marks.items()}


def _mark(device: torch.device) -> Any:
    """Give the present moment; on a GPU an event in the stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else 1e-3 * float(start.elapsed_time(end))
