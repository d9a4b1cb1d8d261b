"""`fold_norms`: trace, plan, apply, verify."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from stabnorm import _checks
from stabnorm._checks import check_choice, check_flag, check_function, check_has_numbers
from stabnorm._models.copies import copied
from stabnorm._models.devices import device_of, floating_tensor_of
from stabnorm._models.examples import read_examples
from stabnorm._models.hooks import uncounted
from stabnorm._models.intact import intact_on_error
from stabnorm._models.outputs import Picker
from stabnorm._models.random_state import random_state_kept
from stabnorm._models.tree import replace_modules
from stabnorm._models.wrappers import is_compiled, is_scripted
from stabnorm.errors import StabNormError
from stabnorm.fold._activated import standing_for
from stabnorm.fold._apply import apply_plan, set_gain
from stabnorm.fold._lanes import Lanes, make_lanes
from stabnorm.fold._plan import Plan
from stabnorm.fold._settle import settle
from stabnorm.fold._sites import HOOKED, Site, find_gains, find_sites, is_under
from stabnorm.fold._verify import largest_error, run_all
from stabnorm.fold.folded import FrozenAffine
from stabnorm.fold.manifest import manifest_of, own_parameters, write_computed
from stabnorm.fold.result import FoldedSite, FoldResult
from stabnorm.nn.mixed_in import MixedIn


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

    The model runs on the example while each norm's channels are followed to whatever reads them. A norm goes
    forward into the linear and convolution layers that read it, or along the residual stream of a post-norm model, or
    backward into the layer before it; a norm that finds no place becomes one multiply-add. A LayerNorm or RMSNorm stays
    and is named. Then both models run, in float64 where a ``.double()`` copy can. A fold that does not hold is rolled
    back.

    Second inputs, made from the example, are followed and compared, too: they have other values, other tokens, and
    other sizes wherever the model takes them. An expert that none of these reached is changed as the experts beside it
    in the same list; any other part that was not reached and could read a norm keeps it. A path without weights of its
    own is not seen if no input takes it: pass several examples where the model has several. A tensor that a forward
    stores, or that a hook takes out, may be unnormalised afterwards.

    Weights that a remedy computes, such as those of `sigma_reparametrize`, become plain parameters first, exactly.

    Args:
        model: in eval mode. RepBN, UnifiedNorm, PRepBN at lam = 0, torch's BatchNorm1d, 2d and 3d, any module with
            ``fold_affine()``, and frozen batch norms fold. Where a BatchNorm's forward does more behind the norm, as
            timm's ``BatchNormAct2d`` with its activation, the norm folds and the rest stays.
        example: the model's arguments: a tensor, a tuple of positional arguments, a dict of keyword arguments, a tuple
            ``(args, kwargs)`` of these, or a list of several examples. A few rows and tokens are enough.
        check: further examples to follow and to verify on. Default: the example with floating tensors redrawn with
            another mean and scale, other tokens, other sizes, and the same masks and scalars. Pass your own where the
            model only ever runs on some sizes.
        residual: whether a residual stream may carry a norm's scale (post-norm models). The weights then grow with
            depth, see `FoldResult.max_gauge`; "auto" is False where parameters are float16. Default: True.
        tied: what to do with a weight that a second module uses under another name, such as an output layer tied to the
            embedding: "untie" gives it a copy, "refuse" keeps its norm. Default: "untie".
        outputs: a function that picks the outputs that matter from what the model returns. A norm whose own output is
            among them cannot go. Default: all outputs.
        strict: raise when a norm is kept. Default: False.
        inplace: fold `model` itself instead of a copy. Weights that change become new Parameters, so that other holders
            of the old ones do not change. Default: False.

    Returns:
        The folded model, and for each norm where it went or why it stays; see `FoldResult`.

    Raises:
        TypeError: `example` or `check` has none of the formats, `model` is no module, or a `fold_affine` does not
            return (scale, shift, channel_dim).
        ValueError: an option is unknown, the example does not run or has no finite output, or the model cannot be
            copied or followed.
        StabNormError: the model is in training mode, compiled, scripted, without numbers (meta, lazy) or itself a norm;
            a `fold_affine` has other channels than its norm reads; or `strict` and one is kept.

    RepBN's fold is arXiv:2405.11582, eq. 4; the method here is ours.

    >>> from stabnorm.nn import RepBN
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), RepBN(8), nn.Linear(8, 2)).eval()
    >>> result = fold_norms(model, torch.randn(3, 4))
    >>> [(norm.name, norm.status, norm.into) for norm in result.norms]
    [('2', 'forward', ('3',))]
    >>> result.max_rel_error < 1e-12, result.model[2]
    (True, FoldedNorm())
    """
    return _fold(find_sites, model, example, check, residual, tied, outputs, strict, inplace)


def fold_gains(
    model: nn.Module,
    example: Any,
    *,
    check: Any = None,
    tied: Literal["untie", "refuse"] = "untie",
    outputs: Callable[[Any], Any] | None = None,
    inplace: bool = False,
) -> FoldResult:
    r"""Fold gain and bias of the norms that stay (LayerNorm, RMSNorm, DyT, Derf) into what reads them, and verify.

    .. math:: W (\gamma \odot n(x) + \beta) + b = (W \operatorname{diag}(\gamma))\, n(x) + (b + W \beta)

    The norms stay, with gain 1 and bias 0, and every one has the status "kept". `into` names the layers that took its
    gain and bias in; where there are none, `reason` says why. Method and arguments are those of `fold_norms`.

    Args:
        model: in eval mode.
        example: see `fold_norms`.
        check: see `fold_norms`. Default: the example, redrawn.
        tied: see `fold_norms`. Default: "untie".
        outputs: see `fold_norms`. Default: all.
        inplace: fold `model` itself instead of a copy. Default: False.

    Returns:
        The model, and for each norm where its gain and bias went; see `FoldResult`.

    Raises:
        TypeError: `example` or `check` has none of the formats, or `model` is no module.
        ValueError: an option is unknown, the example does not run, or the model cannot be copied or followed.
        StabNormError: the model is in training mode, compiled, scripted, without numbers (meta, lazy) or itself a norm.

    >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    >>> nn.init.uniform_(model[0].weight), nn.init.normal_(model[0].bias)
    (...)
    >>> result = fold_gains(model, torch.randn(3, 8))
    >>> result.norms[0].into, result.model[0].weight.unique().tolist()
    (('1',), [1.0])
    """
    return _fold(find_gains, model, example, check, False, tied, outputs, False, inplace)


Find = Callable[[nn.Module], tuple[list[Site], dict[str, str]]]


def fold_sites(find: Find, model: nn.Module, example: Any, *, tied: Literal["untie", "refuse"]) -> FoldResult:
    """Fold in a copy what `find` returns for it, as `stabnorm.fold._sites.find_sites` does; see `fold_norms`."""
    return _fold(find, model, example, None, False, tied, None, False, False)


def _fold(
    find: Find,
    model: nn.Module,
    example: Any,
    check: Any,
    residual: bool | Literal["auto"],
    tied: str,
    outputs: Picker,
    strict: bool,
    inplace: bool,
) -> FoldResult:
    check_options(residual=residual, tied=tied, outputs=outputs, strict=strict)
    check_flag("inplace", inplace)
    check_model(model)
    computed = [name for name, module in model.named_modules() if isinstance(module, MixedIn) and module.computes]
    examples = read_examples("example", example)
    others = None if check is None else read_examples("check", check)
    if computed and not inplace:
        model, inplace = copied(model), True
    written, random_state = _computed_weights_written(model, computed), random_state_kept(device_of(model))
    with written, random_state, torch.inference_mode(False), uncounted():
        sites, staying = find(model)
        if "" in staying or any(not site.name for site in sites):
            raise StabNormError(
                "the model is itself a norm: there is nothing around it to fold it into. Fold what holds it"
            )
        if residual == "auto":
            residual = not any(p.dtype == torch.float16 for p in model.parameters())
        lanes = make_lanes(model, sites, examples, others, outputs)
        plan, error = settle(lanes, {"residual": residual, "tied": lanes.tied, "untie": tied == "untie"}, outputs)
        vacuous = not _shows_faults(lanes, plan, outputs)
        norms = _report(model, plan, {**staying, **_functional(lanes, [*staying, *(site.name for site in sites)])})
        kept = [norm for norm in norms if norm.status == "kept"]
        if strict and kept:
            raise StabNormError(
                f"{len(kept)} norms are kept, the first is {kept[0].name!r}: {kept[0].reason}. strict=False folds the "
                "rest"
            )
        manifest = {**manifest_of(plan), "computed": computed}
        if find is find_sites and kept and not sites and not computed and HOOKED not in staying.values():
            warnings.warn(
                f"nothing is folded: no norm is affine in eval. '{kept[0].name}': {kept[0].reason}", stacklevel=3
            )
        _warn(manifest, vacuous)
        folded = model if inplace else copied(model)
        with intact_on_error(folded):
            if inplace:  # the first change to the user's model; whatever shares memory with a weight does not change
                named = {name for name, _ in folded.named_parameters(remove_duplicate=False)}
                own_parameters(folded, plan.parameters & named)
            apply_plan(plan, manifest, folded)
    precision = lanes.precision(error)
    return FoldResult(folded, norms, error, precision, lanes.checked_on, vacuous, plan.max_gauge, manifest)


@contextmanager
def _computed_weights_written(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Let the modules of these names have plain parameters; if the body raises, they compute their weights again."""
    if not names:
        yield
        return
    with intact_on_error(model):
        write_computed(model, names)
        yield


def _warn(manifest: dict[str, Any], vacuous: bool) -> None:
    if vacuous:
        warnings.warn(
            "the model's output does not change when its norms do, so the check of the fold says nothing. Is a head or "
            "a layer scale still at zero, or the output saturated? Pass outputs= or check= with something that varies.",
            stacklevel=4,
        )
    adapters = [name for name in manifest["biases"] if "lora_" in name]
    if adapters:
        warnings.warn(
            f"a bias was added to {len(adapters)} LoRA adapters, first {adapters[0]!r}, and merging them later would "
            "lose it. Merge the adapters into their layers first, then fold.",
            stacklevel=4,
        )


# --- what cannot be folded at all ---


def check_options(
    *, residual: Any = True, tied: Any = "untie", outputs: Any = None, strict: Any = False, check: Any = None
) -> None:
    """Check the options of `fold_norms` before there is a model.

    Raises:
        TypeError: an option has another type.
        ValueError: an option is unknown.
    """
    check_choice("residual", residual, (True, False, "auto"))
    check_choice("tied", tied, ("untie", "refuse"))
    if outputs is not None:
        check_function("outputs", outputs, "what the model returns")
    check_flag("strict", strict)
    if check is not None:
        read_examples("check", check)


def check_model(model: nn.Module, is_eval: bool = True) -> None:
    """Raise TypeError or StabNormError for a model that cannot be folded, whatever its norms are."""
    _checks.check_model("model", model)
    check_has_numbers(model, "to fold")
    for name, module in model.named_modules():
        where = repr(name) if name else "the model"
        if is_eval and module.training:
            raise StabNormError(f"{where} is in training mode, where a norm is no affine map. Call model.eval() first")
        if is_scripted(module):
            raise StabNormError(
                f"{where} is scripted, so its operations cannot be followed. Fold first, then export or trace"
            )
        if is_compiled(module):
            raise StabNormError(f"{where} is compiled, so its operations cannot be followed. Fold first, then compile")


# --- what is said about it ---


def _shows_faults(lanes: Lanes, plan: Plan, outputs: Picker) -> bool:
    """Whether the outputs change when every norm that the plan changes is off by a hundredth."""
    lane = lanes.lanes[0]
    changed = {fold.name for fold in plan.folds if fold.status != "kept"} | {site.name for site in plan.neutral}
    if not changed:
        return True
    faulty = copied(lane.model)
    like = floating_tensor_of(faulty)
    new: dict[str, nn.Module] = {}
    for site in lanes.trace.sites:
        if site.name not in changed:
            continue
        scale, shift = 1.01 * site.scale, site.shift + 0.01 * site.scale.abs().mean()
        if site.gain is None:
            affine = FrozenAffine(*site.frozen(scale.to(like), shift.to(like)))
            norm, axes = faulty.get_submodule(site.name), plan.contiguous.get(site.name)
            new[site.name] = standing_for(norm, affine, goes_on=site.goes_on, axes=axes)
        else:
            set_gain(faulty, site, scale, shift)
    replace_modules(faulty, new)
    try:
        error = largest_error(run_all(faulty, lane.examples, outputs), lane.expected)
    except Exception:  # its code computes with a norm's attributes, and a multiply-add has empty ones
        return True
    return not error <= lane.tolerance


def _functional(lanes: Lanes, known: list[str]) -> dict[str, str]:
    """Say why norms stay that are no module, but a function that a forward calls."""
    return {
        path: f"its forward calls {name} itself: make that a module, and switch it first (convert_norms), or leave it"
        for path, name in lanes.trace.functional.items()
        if not is_under(path, known)
    }


def _report(model: nn.Module, plan: Plan, staying: dict[str, str]) -> list[FoldedSite]:
    sites = {site.name: site for site in plan.folds}
    sites |= {name: FoldedSite(name, "kept", (), reason) for name, reason in staying.items()}
    return [sites[name] for name, _ in model.named_modules() if name in sites]
