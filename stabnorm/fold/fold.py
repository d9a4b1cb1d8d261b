"""`fold_norms`: trace, plan, apply, verify."""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from stabnorm.errors import StabNormError
from stabnorm.fold._apply import apply_plan
from stabnorm.fold._examples import Example, cast, read_examples, redrawn
from stabnorm.fold._follow import trace_model
from stabnorm.fold._plan import FOLDED, Plan, plan_folds
from stabnorm.fold._sites import Site, find_sites
from stabnorm.fold._trace import Trace
from stabnorm.fold._verify import TOLERANCE, Outputs, Precision, finite, largest_error, run_all, sees
from stabnorm.fold.manifest import manifest_of
from stabnorm.fold.result import FoldedSite, FoldResult


def fold_norms(
    model: nn.Module,
    example: Any,
    *,
    check: Any = None,
    residual: bool | Literal["auto"] = True,
    tied: Literal["untie", "refuse"] = "untie",
    outputs: Callable[[Any], Any] | None = None,
    strict: bool = False,
    inplace: bool = False,
) -> FoldResult:
    r"""Fold every norm that is one affine map per channel in eval into the weights around it, and verify the result.

    .. math:: W (a \odot x + c) + b = (W \operatorname{diag}(a))\, x + (b + W c)

    The model runs once on the example while each norm's channels are followed to whatever reads them. A norm goes
    forward into the linear and convolution layers that read it, or along the residual stream of a post-norm model, or
    backward into the layer before it; what finds no place becomes one multiply-add. A LayerNorm or RMSNorm stays and is
    named. Then both models run, in float64 where a ``.double()`` copy can, on the example and on a second input; what
    does not hold is rolled back.

    A path that the example does not take is not seen: pass several examples where there are several paths, and where a
    multiplication by ``x.shape[1] ** -0.5`` or the like depends on the shape. What a forward stores aside, or a hook
    takes out, may be unnormalised afterwards.

    Args:
        model: in eval mode. RepBN, UnifiedNorm, PRepBN at lam = 0, torch's BatchNorm1d, 2d and 3d, and any module with
            ``fold_affine()`` fold.
        example: a tensor, a tuple of positional arguments, a dict of keyword arguments, a tuple ``(args, kwargs)`` of
            these, or a list of such; a small batch will do.
        check: further inputs to verify on, in the same formats. Default: the example with floating tensors redrawn with
            another mean and scale, integers shuffled, masks and scalars kept.
        residual: whether a residual stream may carry a norm's scale (post-norm models). Weights grow with depth then,
            see `FoldResult.max_gauge`; "auto": not where parameters are float16. Default: True.
        tied: what to do with a weight that is also used elsewhere under another name, such as an output layer tied to
            the embedding: "untie" gives it a copy, "refuse" leaves its norm. Default: "untie".
        outputs: picks the outputs that matter from what the model returns. A norm whose own output is among them cannot
            go. Default: all.
        strict: raise when a norm is kept. Default: False.
        inplace: fold `model` itself instead of a copy. Default: False.

    Returns:
        The folded model, and for each norm where it went or why it did not; see `FoldResult`.

    Raises:
        TypeError: `example` or `check` has none of the formats.
        ValueError: an option is unknown, the example does not run, or the model cannot be copied.
        StabNormError: the model is in training mode, compiled, scripted or itself a norm; or `strict` and one is kept.

    RepBN's fold is arXiv:2405.11582, eq. 4; the method here is ours.

    >>> from stabnorm.nn import RepBN
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), RepBN(8), nn.Linear(8, 2)).eval()
    >>> result = fold_norms(model, torch.randn(3, 4))
    >>> [(norm.name, norm.status, norm.into) for norm in result.norms]
    [('2', 'forward', ('3',))]
    >>> result.max_rel_error < 1e-12, result.model[2]
    (True, FoldedNorm())
    """
    _check_options(residual, tied)
    _check_model(model)
    examples = read_examples("example", example)
    others = None if check is None else read_examples("check", check)
    sites, staying = find_sites(model)
    if "" in staying or any(not site.name for site in sites):
        raise StabNormError(
            "the model is itself a norm: there is nothing around it to fold it into. Fold what holds it"
        )
    if residual == "auto":
        residual = not any(p.dtype == torch.float16 for p in model.parameters())
    own = _own_lane(model, examples, others, outputs)
    lane, trace, tied_names = _traced_lane(model, sites, examples, own, outputs)
    lanes = [lane, own] if lane.precision == torch.float64 else [own]
    options = {"residual": residual, "tied": tied_names, "untie": tied == "untie"}
    plan, error = _settle(trace, lanes, options, outputs)
    norms = _report(model, plan, staying)
    kept = [norm for norm in norms if norm.status == "kept"]
    if strict and kept:
        raise StabNormError(
            f"{len(kept)} norms are kept, the first is {kept[0].name!r}: {kept[0].reason}. strict=False folds the rest"
        )
    folded = model if inplace else _copied(model)
    manifest = manifest_of(plan)
    apply_plan(plan, manifest, folded)
    first = lanes[0]
    reached = [sites[index] for index in {call.site for call in trace.calls}]
    vacuous = bool(reached) and not sees(first.model, reached, first.examples, first.expected, outputs, first.lowest)
    if vacuous:
        warnings.warn(
            "fold_norms: the model's output does not change when its norms do, so the check says nothing. Is a head or "
            "a layer scale still at zero, or the output saturated? Pass outputs= or check= with something that varies.",
            stacklevel=2,
        )
    lowest = torch.float64 if error <= TOLERANCE[torch.float64] else lanes[0].lowest
    return FoldResult(
        folded, norms, error, str(lowest).removeprefix("torch."), own.checked_on, vacuous, plan.max_gauge, manifest
    )


# --- what cannot be folded at all ---


def _check_options(residual: object, tied: object) -> None:
    if residual not in (True, False, "auto"):
        raise ValueError(f"residual={residual!r} is unknown. Choose True, False or 'auto'")
    if tied not in ("untie", "refuse"):
        raise ValueError(f"tied={tied!r} is unknown. Choose 'untie' or 'refuse'")


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"'{name}'" if name else "the model"
        if module.training:
            raise StabNormError(f"{where} is in training mode, where a norm is no affine map. Call model.eval() first")
        if isinstance(module, torch.jit.ScriptModule):
            raise StabNormError(f"{where} is scripted, so its operations cannot be followed. Fold first, then script")
        if type(module).__name__ == "OptimizedModule":
            raise StabNormError(f"{where} is compiled, so its operations cannot be followed. Fold first, then compile")


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"the model cannot be copied, which verifying needs: {error}") from error


# --- two lanes: the model in float64, and as it is ---


@dataclass
class _Lane:
    """The model before folding, in one precision, with what it returns."""

    model: nn.Module
    examples: list[Example]
    expected: Outputs
    precision: torch.dtype
    lowest: torch.dtype
    checked_on: str = ""


def _own_lane(
    model: nn.Module,
    examples: list[Example],
    others: list[Example] | None,
    outputs: Callable[[Any], Any] | None,
) -> _Lane:
    unfolded = _copied(model)
    precision = Precision()
    try:
        with precision:
            expected = run_all(unfolded, examples, outputs)
        again = run_all(unfolded, examples, outputs)
    except Exception as error:
        raise ValueError(
            f"the model does not run on the example: {type(error).__name__}: {error}. A tuple is positional arguments, "
            "a dict keyword arguments, a tuple (args, kwargs) both"
        ) from error
    lowest = precision.lowest
    if largest_error(again, expected) > TOLERANCE[lowest]:
        raise ValueError(
            "the model returns something else each time it runs the example. Take out what is random in eval"
        )
    said = "the example" if len(examples) == 1 else f"{len(examples)} examples"
    if others is not None:
        try:
            expected = expected + run_all(unfolded, others, outputs)
        except Exception as error:
            raise ValueError(f"the model does not run on check: {type(error).__name__}: {error}") from error
        return _Lane(model, examples + others, expected, lowest, lowest, f"{said} and check")
    for example in examples:
        second = redrawn(example)
        try:
            (found,) = run_all(unfolded, [second], outputs)
        except Exception:  # not every shuffled input is one: then the example must do
            continue
        if finite(found):
            examples, expected = [*examples, second], [*expected, found]
            said = f"{said.removesuffix(' and a second input')} and a second input"
    return _Lane(model, examples, expected, lowest, lowest, said)


def _traced_lane(
    model: nn.Module,
    sites: Sequence[Site],
    examples: list[Example],
    own: _Lane,
    outputs: Callable[[Any], Any] | None,
) -> tuple[_Lane, Trace, dict[str, str]]:
    """The model in float64 if it runs so, else as it is; its trace, and which of its parameters had another owner."""
    try:
        wide = _copied(model).double()
        names = _untie(wide)
        inputs = [cast(example, torch.float64) for example in own.examples]
        trace, _ = trace_model(wide, sites, inputs[: len(examples)], outputs)
        precision = Precision()
        with precision:
            expected = run_all(wide, inputs, outputs)
        if all(finite(tensors) for tensors in expected):
            return _Lane(wide, inputs, expected, torch.float64, precision.lowest), trace, names
    except Exception:  # a quantised layer, a kernel without float64: say so in the result, and do without
        pass
    plain = _copied(model)
    names = _untie(plain)
    trace, _ = trace_model(plain, sites, examples, outputs)
    return own, trace, names


def _untie(model: nn.Module) -> dict[str, str]:
    """Give every module its own copy of a parameter it shares; returns for each such name another one of it.

    So the trace tells who reads which. Only copies that are changed are kept in the folded model.
    """
    owners: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{name}.{attribute}" if name else attribute
                owners.setdefault(id(parameter), []).append((module, attribute, full))
    tied = {}
    for shared in owners.values():
        for module, attribute, name in shared[1:]:
            tied[name] = shared[0][2]
            tied.setdefault(shared[0][2], name)
            parameter = module._parameters[attribute]
            assert parameter is not None
            setattr(module, attribute, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    return tied


# --- plan, try, roll back ---


def _settle(
    trace: Trace, lanes: Sequence[_Lane], options: dict[str, Any], outputs: Callable[[Any], Any] | None
) -> tuple[Plan, float]:
    """The plan that holds, and its error in the first lane."""
    refused: dict[str, str] = {}
    fixed: dict[str, str] = {}
    while True:
        plan = plan_folds(trace, **options, refused=refused, fixed=fixed)
        error, problem = _try(plan, lanes, outputs)
        if not problem:
            return plan, error
        folded = [fold.name for fold in plan.folds if fold.status in FOLDED]
        assert folded or plan.affine, "a plan that changes nothing holds"
        faults = {
            name: _fault(trace, name, name in folded, lanes, options, outputs) for name in [*folded, *plan.affine]
        }
        culprits = {name: fault for name, fault in faults.items() if fault}
        for name, fault in (culprits or dict.fromkeys(folded or plan.affine, problem)).items():
            (refused if name in folded else fixed)[name] = fault


def _fault(
    trace: Trace,
    name: str,
    folds: bool,
    lanes: Sequence[_Lane],
    options: dict[str, Any],
    outputs: Callable[[Any], Any] | None,
) -> str:
    """What is wrong when this norm alone is changed; empty if nothing is."""
    others = {site.name: "not on trial" for site in trace.sites if site.name != name}
    refused = {} if folds else {name: "on trial as it stays"}
    return _try(plan_folds(trace, **options, refused=refused, fixed=others), lanes, outputs)[1]


def _try(plan: Plan, lanes: Sequence[_Lane], outputs: Callable[[Any], Any] | None) -> tuple[float, str]:
    """The error in the first lane, and what is wrong; empty if nothing is."""
    errors = []
    for lane in lanes:
        folded = copy.deepcopy(lane.model)
        try:
            apply_plan(plan, manifest_of(plan), folded)
            error = largest_error(run_all(folded, lane.examples, outputs), lane.expected)
        except Exception as raised:
            return float("inf"), f"rolled back: the folded model does not run ({type(raised).__name__}: {raised})"
        errors.append(error)
        if not error <= TOLERANCE[lane.lowest]:
            return error, f"rolled back: the folded model's output is off by {error:.1e} of its largest element"
    return errors[0], ""


def _report(model: nn.Module, plan: Plan, staying: dict[str, str]) -> list[FoldedSite]:
    found = {fold.name: FoldedSite(fold.name, fold.status, fold.into, fold.reason) for fold in plan.folds}
    found |= {name: FoldedSite(name, "kept", (), reason) for name, reason in staying.items()}
    return [found[name] for name, _ in model.named_modules() if name in found]
