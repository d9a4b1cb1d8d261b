"""`convert_norms`: convert a model's layer and rms norms, in place, to norms that are affine in eval.

The whole conversion is planned first. Then the plan is carried out, and taken back if a norm's class does not allow it.
So the model is converted as the report says or, after an error, unchanged.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from stabnorm._checks import check_choice, check_has_numbers, check_loader, check_model, check_names
from stabnorm._log import printable
from stabnorm._models.ambient import plain_context
from stabnorm._models.intact import intact_on_error
from stabnorm._models.names import compiled
from stabnorm._models.tables import aligned
from stabnorm._models.tree import Tree
from stabnorm._models.wrappers import is_scripted, parallel_wrapper
from stabnorm._surgery import Plan, Target, done_before, plan_conversion
from stabnorm.errors import StabNormError
from stabnorm.fit.start import fit_copies, start_from_fits
from stabnorm.fit.sums import Affine
from stabnorm.nn._base import TARGETS
from stabnorm.nn._fused_path import leave_fused_paths
from stabnorm.nn._progressive import ProgressiveNorm
from stabnorm.nn.elementwise import SquashingNorm
from stabnorm.norms import Kind, NormLayer, NormSearch

__all__ = ["ConversionReport", "NormConversion", "Target", "convert_norms"]


@dataclass(frozen=True)
class NormConversion:
    """What became of one norm.

    Args:
        name: Dotted name in the model.
        converted: Whether this call converted it.
        kind: "layer", "rms", "batch", "group" or "instance"; "unknown" for what only looks like a norm.
        reason: Why it was left alone, or what was kept of a norm that was converted.
    """

    name: str
    converted: bool
    kind: Kind | Literal["unknown"]
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_norms` did, norm by norm. `str` gives a table.

    Args:
        to: The target of the conversion.
        norms: One entry for each norm, in module order.
    """

    to: Target
    norms: tuple[NormConversion, ...]

    @property
    def converted(self) -> list[str]:
        """Names of the norms that this call converted."""
        return [norm.name for norm in self.norms if norm.converted]

    @property
    def left(self) -> dict[str, str]:
        """Names of the norms that it left alone, with the reasons."""
        return {norm.name: norm.reason for norm in self.norms if not norm.converted}

    def __str__(self) -> str:
        head = f"{len(self.converted)} of {len(self.norms)} norms converted to {self.to}"
        return "\n".join([head, *_table(self.norms)])


def convert_norms(
    model: nn.Module,
    to: Target = "prepbn",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    loader: Iterable[Any] | None = None,
    **norm_options: Any,
) -> ConversionReport:
    r"""Convert a model's layer and rms norms, in place, to norms that are affine in eval.

    ``to="prepbn"`` changes the class of each norm object to a subclass of `PRepBN` and of its own class. Parameters and
    their names, hooks, places in the model and ``isinstance`` checks stay valid, and with lam = 1 the norm computes the
    same bits as before. It gets the child `rep` and the buffer `lam`; move lam to 0 while the model trains. A frozen
    norm gets a frozen `rep`.

    .. math:: y = \lambda\, \mathrm{norm}(x) + (1 - \lambda)\, \mathrm{RepBN}(x)

    ``to="taper"`` does the same with `TaperNorm`, whose branch is one calibrated number times the input and a gain.

    All other targets put a new module in the norm's place, under every name that the norm has, and change at once
    what the model computes. The new module has the same weight and bias Parameters as the norm, so an optimizer that
    was built before still trains them. Where that is impossible (a gain of 1 + weight, another shape), a new Parameter
    gets the value. What the norm did not have (`eta`, a bias for PowerNorm, a weight where there was none) starts as in
    a new module. A norm whose bias would be lost is left alone. Forward and backward hooks move to the new module. All
    other attributes of the old object are lost, and a reference outside of the module tree, such as in a list, still
    leads to the old norm.

    A norm without weights may take any number of channels. Its successor learns the number from its first input, or
    from a checkpoint; run a batch before the model is compiled or wrapped.

    Convert before the optimizer is built and before the model is wrapped for several processes, for instance in
    ``__init__`` or ``configure_model``. Then checkpoints of the converted model load. With "prepbn" and "taper", a
    checkpoint from before the conversion loads, too. A second call changes nothing.

    At lam = 1 the gradients are the same bits as before if the norm is one operation. A norm of several operations,
    like Llama's, sums its own gradients before those of the residual are added, which may change the last bit.

    ``nn.TransformerEncoder`` has a fused path for eval that reads the norms' weights and never calls the norms. This
    path is switched off in the layers concerned, and so are nested tensors, so that eval computes what was trained.
    With a padding mask, padded places then hold numbers instead of zeros.

    Args:
        model: Any module.
        to: "prepbn", "taper", "repbn", "unified" or "power"; or a baseline that does not fold, to compare with: "dyt",
            "derf" or "srms", see `stabnorm.nn.DyT`, `Derf` and `SRMSNorm`. Default: "prepbn".
        include: Regular expression, or several, searched for in a norm's name. Default: all norms.
        exclude: The same, for norms to leave alone; it wins over `include`. Default: none.
        loader: A DataLoader or a list of batches for ``init="fit"``, which uses the first 32. A tensor is the model's
            input, a tuple or list is ``(input, targets, ...)``, and a mapping holds keyword arguments; if it has the
            key "attention_mask", padding does not count. Default: none.
        **norm_options: Further arguments of `PRepBN` and its `RepBN`, or of the other target's class.
            Three defaults differ. RepBN has ``filtration="calibrated"``, so that a burst stays out of its running
            statistics, and for an rms norm ``center=False``, a scale only. UnifiedNorm has a bias if the norm has one.
            With "prepbn", `init` is "norm": RepBN starts with the gain and bias of the norm, see `PRepBN`. The paper
            uses "vision" (gamma = eta = 1) for DeiT, PVT and Swin, and "language" (both 0) for language models after
            10000 steps at lam = 1. For "prepbn" and a trained model there is also "fit": RepBN starts as the affine map
            that comes closest to the norm on `loader`, as `remove_norms` fits it, and keeps it when lam leaves 1. `eps`
            is that of the new norm, 1e-5 unless given; the old norm keeps its own.

    Returns:
        What was converted, what was left, and why.

    Raises:
        ValueError: `to` is unknown, `include` or `exclude` is invalid or matches no norm, an option is out of range, or
            only one of ``init="fit"`` and `loader` is given, or they are given for another `to` than "prepbn".
        TypeError: the target has no such option, or an argument has another type.
        StabNormError: there is no norm to convert, or the model is wrapped in DDP or FSDP already; or the loader is
            empty, or the model does not run on its batches; or the class of a norm does not allow the conversion. The
            model has not changed then.

    Source: arXiv:2405.11582 (PRepBN and RepBN), 2602.10408 (TaperNorm), 2208.01313 (UnifiedNorm), 2003.07845
    (PowerNorm), 2503.10622 (DyT), 2512.10938 (Derf), 2307.14995 (SRMSNorm).

    Example:
        >>> import torch
        >>> from stabnorm import convert_norms
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.BatchNorm1d(8))
        >>> x = torch.randn(3, 4)
        >>> before = model(x)
        >>> print(convert_norms(model))
        1 of 2 norms converted to prepbn
          1  layer  converted  class PRepBNLayerNorm
          2  batch  left       it is batch norm, affine in eval already
        >>> torch.equal(model(x), before), isinstance(model[1], nn.LayerNorm)
        (True, True)
        >>> convert_norms(model).left["1"]
        'already converted to PRepBN'
    """
    fit = _asks_for_fit(to, loader, norm_options)
    if fit:
        norm_options["init"] = "norm"
    check_conversion(model, to, norm_options)
    if loader is not None:
        check_loader("loader", loader)
        check_has_numbers(model, "to fit to")
    every = NormSearch(model)
    search = every if include is None and exclude is None else NormSearch(model, include, exclude)
    check_patterns(model, every, include=include, exclude=exclude)
    tree = Tree(model)
    plans = {id(module): done_before(module) for module in model.modules() if isinstance(module, SquashingNorm)}
    plans |= {id(layer.module): plan_conversion(layer, to, norm_options, tree) for layer in search.found}
    report = _report(to, search, plans, tree)
    if not any(plan.carry_out or plan.done_before for plan in plans.values()):
        table = "\n".join(_table(report.norms)) or f"  {len(every.found)} norms, none of them included"
        raise StabNormError(
            f"{type(model).__name__} has no norm to convert. What there is:\n{table}\n"
            "Convert a model that has layer or rms norms, after it has built them"
        )
    search.warn(stacklevel=3)
    fits: Mapping[str, Affine] = {}
    if loader is not None and report.converted:
        sized = {layer.name for layer in search.found if not layer.any_width}
        fits = fit_copies(model, loader, sized & {*report.converted}, lambda copy: convert_norms(copy, **norm_options))
    with plain_context(), intact_on_error(model):
        for layer in search.found:
            _carry_out(plans[id(layer.module)], layer, to)
        if fits:
            start_from_fits(model, fits)
        leave_fused_paths(model)
    return report


def _carry_out(plan: Plan, layer: NormLayer, to: Target) -> None:
    if plan.carry_out is None:
        return
    class_name = type(layer.module).__name__
    try:
        plan.carry_out()
    except Exception as error:  # the class of the user's norm may raise anything
        raise StabNormError(
            f"layer {layer.name!r} ({class_name}) cannot be converted to {to}: "
            f"{type(error).__name__}: {error}. The model has not changed. Leave the layer out with exclude="
        ) from error


# --- the report ---

_LAZY = "it does not know its size yet: run one batch first"


def _report(to: Target, search: NormSearch, plans: dict[int, Plan], tree: Tree) -> ConversionReport:
    entries: list[tuple[nn.Module, NormConversion]] = []
    for layer in search.found:
        plan = plans[id(layer.module)]
        entries.append((layer.module, NormConversion(layer.name, bool(plan.carry_out), layer.kind, plan.reason)))
    for name, module in search.unknown:
        reason = f"what {type(module).__name__} computes is not known: tell stabnorm.register_norm"
        if is_scripted(module):
            reason = "it is compiled by torch.jit: convert the model, then compile it"
        entries.append((module, NormConversion(name, False, "unknown", reason)))
    entries += [(module, NormConversion(name, False, "unknown", _LAZY)) for name, module in search.lazy]
    for name, module in tree.model.named_modules():
        if isinstance(module, SquashingNorm):
            entries.append((module, NormConversion(name, False, "unknown", plans[id(module)].reason)))
    return ConversionReport(
        to, tuple(norm for _, norm in sorted(entries, key=lambda entry: tree.position[id(entry[0])]))
    )


def _table(norms: Iterable[NormConversion]) -> list[str]:
    rows = [
        (norm.name or "(model)", norm.kind, "converted" if norm.converted else "left", norm.reason) for norm in norms
    ]
    return aligned(rows, indent=2)


# --- what is wrong with the call ---


def _asks_for_fit(to: Target, loader: Iterable[Any] | None, options: dict[str, Any]) -> bool:
    init = options.get("init")
    fit = isinstance(init, str) and init == "fit"
    if fit and to != "prepbn":
        raise ValueError(f"init='fit' is for to='prepbn', not {to!r}: what it fits to is the norm beside RepBN")
    if fit and loader is None:
        raise ValueError("init='fit' needs batches to fit to. Pass loader=, a DataLoader or a list of batches")
    if fit and options.get("statistic", "l2") != "l2":
        raise ValueError(
            f"init='fit' fits the standard deviation, and statistic={options['statistic']!r} divides by another, "
            "so that the fit would drift in training. Leave statistic out, or take another init"
        )
    if loader is not None and not fit:
        raise ValueError("loader= is what init='fit' fits to, and init is something else. Leave one of them out")
    return fit


def check_conversion(model: nn.Module, to: Target, options: dict[str, Any]) -> None:
    """Check the arguments of a conversion before any norm is read.

    Raises:
        ValueError: `to` is unknown.
        TypeError: `model` is no module, or the target has no such option.
        StabNormError: the model is wrapped in DDP or FSDP already.
    """
    check_model("model", model)
    check_target(to)
    check_names(f"to={to!r}", options, TARGETS[to].conversion_options())
    for name, module in model.named_modules():
        wrapper = parallel_wrapper(module)
        if wrapper:
            raise StabNormError(
                f"{printable(name) or 'the model'} is wrapped in {wrapper} already, which would not know the "
                "parameters that conversion adds. Convert the model first, then wrap it"
            )


def check_norm_options(to: Target, options: dict[str, Any]) -> None:
    """Check the further arguments of `convert_norms` before there is a model.

    Raises:
        TypeError: the target has no such option, or one has another type.
        ValueError: one is out of range.
    """
    check_names("norm_options", options, {*TARGETS[to].conversion_options(), "loader"})
    values = {name: value for name, value in options.items() if name != "loader"}
    if _asks_for_fit(to, options.get("loader"), values):
        values["init"] = "norm"
    TARGETS[to].check_options(**values)


def check_target(to: Target) -> None:
    """Raise ValueError unless `to` is what a norm can be converted to."""
    check_choice("to", to, sorted(TARGETS))


def has_lam(to: Target) -> bool:
    """Whether the target keeps the norm and blends into another map, by a lam that moves in training."""
    return issubclass(TARGETS[to], ProgressiveNorm)


def check_patterns(model: nn.Module, every: NormSearch, **filters: str | Sequence[str] | None) -> None:
    """Raise ValueError for a pattern that matches no norm, because it is a slip."""
    norms = [name for name, _ in every.unknown + every.lazy] + [layer.name for layer in every.found]
    for argument, patterns in filters.items():
        for pattern in [] if patterns is None else compiled(argument, patterns):
            if norms and not any(map(pattern.search, norms)):
                some = ", ".join(map(repr, norms[:8])) + (", ..." if norms[8:] else "")
                slip = f"{argument}={pattern.pattern!r}"
                raise ValueError(f"{slip} matches none of the {len(norms)} norms of {type(model).__name__}: {some}")
