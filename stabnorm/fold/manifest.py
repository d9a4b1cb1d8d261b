"""The manifest: what folding changed in a model's structure, as JSON; with it a fresh model loads the weights."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from stabnorm._checks import check_model, wrong_type
from stabnorm._models.ambient import plain_context
from stabnorm._models.devices import floating_tensor_of
from stabnorm._models.intact import intact_on_error
from stabnorm._models.tree import replace_modules
from stabnorm.fold._activated import standing_for
from stabnorm.fold._plan import Plan
from stabnorm.fold._ties import drop_ties
from stabnorm.fold.folded import FoldedNorm, FrozenAffine
from stabnorm.fold.result import FOLDED
from stabnorm.nn._base import take_flags
from stabnorm.nn._fused_path import leave_fused_paths
from stabnorm.nn.mixed_in import materialize

FORMAT = 1


def manifest_of(plan: Plan) -> dict[str, Any]:
    """Give the structural part of a plan."""
    return {
        "format": FORMAT,
        "folded": [fold.name for fold in plan.folds if fold.status in FOLDED],
        "affine": {
            name: {"num_features": scale.numel() if scale.ndim == 1 else [*scale.shape], "channel_dim": channel_dim}
            for name, (scale, _, channel_dim) in plan.affine.items()
        },
        "biases": {bias.name: bias.size for edit in plan.edits for bias in edit.new_biases},
        "untied": plan.untied,
        "going_on": plan.going_on,
        "contiguous": {name: list(axes) for name, axes in plan.contiguous.items()},
    }


def apply_manifest(model: nn.Module, manifest: Mapping[str, Any]) -> nn.Module:
    """Give a fresh model the structure of a folded one, so that the folded weights load.

    Args:
        model: built like the model that was folded, norms and all; changed in place.
        manifest: `fold_norms(...).manifest`, possibly read back from JSON.

    Returns:
        The model.

    Raises:
        TypeError: the manifest is no dict, or `model` no module.
        ValueError: the manifest has another format, is not whole, or names what the model does not have.

    >>> from stabnorm import apply_manifest, fold_norms
    >>> from stabnorm.nn import RepBN
    >>> build = lambda: nn.Sequential(RepBN(4), nn.Linear(4, 2, bias=False)).eval()
    >>> result = fold_norms(build(), torch.randn(3, 4))
    >>> fresh = apply_manifest(build(), result.manifest)
    >>> fresh.load_state_dict(result.model.state_dict(), strict=True)
    <All keys matched successfully>
    """
    check_model("model", model)
    if not isinstance(manifest, Mapping):
        raise wrong_type("manifest", manifest, "a dict: fold_norms(...).manifest, or what json.loads returns of it")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"the manifest has format {manifest.get('format')!r}, not {FORMAT}. Fold the model again")
    for part in ("folded", "affine", "biases", "untied"):
        if part not in manifest:
            raise ValueError(f"the manifest lacks {part!r}. Give it whole, as fold_norms(...).manifest has it")
    names = [*manifest["folded"], *manifest["affine"], *manifest.get("rms", {})]
    names += [name.rpartition(".")[0] for name in manifest["biases"]]
    missing = [name for name in names if name not in dict(model.named_modules(remove_duplicate=False))]
    missing += [name for name in manifest["untied"] if name not in dict(model.named_parameters(remove_duplicate=False))]
    if missing:
        raise ValueError(
            f"the model has no {missing[0]!r}, which the manifest names. Build it as it was before the fold"
        )
    with intact_on_error(model):
        restructure(model, manifest)
        drop_ties(model, manifest["untied"])
    return model


@plain_context()
def restructure(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Replace norms, register biases and copy tied parameters as a manifest says; numbers come later.

    What the model declares to be tied changes last of all, see `drop_ties`.
    """
    write_computed(model, manifest.get("computed", ()))
    own_parameters(model, manifest["untied"])
    for name, size in manifest["biases"].items():
        owner, attribute = _owner(model, name)
        if owner._parameters.get(attribute) is None:
            _register_zeros(owner, attribute, size)
        if isinstance(owner, nn.MultiheadAttention) and owner.out_proj.bias is None:
            _register_zeros(owner.out_proj, "bias", owner.embed_dim)  # the fast path needs both biases or none
    going_on, contiguous = manifest.get("going_on", ()), manifest.get("contiguous", {})
    new: dict[str, nn.Module] = {}
    for name in manifest["folded"]:
        norm = model.get_submodule(name)
        new[name] = standing_for(norm, FoldedNorm(), goes_on=name in going_on, axes=contiguous.get(name))
    for name, sizes in manifest["affine"].items():
        norm = model.get_submodule(name)
        like = floating_tensor_of(norm)
        dtype = torch.promote_types(like.dtype, torch.float32)
        scale = torch.ones(sizes["num_features"], dtype=dtype, device=like.device)
        affine = FrozenAffine(scale, torch.zeros_like(scale), sizes["channel_dim"])
        new[name] = standing_for(norm, affine, goes_on=name in going_on, axes=contiguous.get(name))
    for name, sizes in manifest.get("rms", {}).items():
        like = floating_tensor_of(model.get_submodule(name), model)
        new[name] = nn.RMSNorm(sizes["num_features"], sizes["eps"], device=like.device, dtype=like.dtype)
    replace_modules(model, new)
    leave_fused_paths(model)


def write_computed(model: nn.Module, names: Iterable[str]) -> None:
    """Make plain parameters and constants of what the modules under these names compute from their parameters alone.

    The last one is first, because positions that a block computes begin with those of the blocks before it.
    """
    for name in reversed(list(names)):
        materialize(model.get_submodule(name))


@plain_context()
def own_parameters(model: nn.Module, names: Iterable[str]) -> None:
    """Give the modules under these names parameters of their own, with memory of their own."""
    for name in names:
        owner, attribute = _owner(model, name)
        shared = owner._parameters[attribute]  # not the attribute: it may be computed, or the class refuse to set it
        assert shared is not None
        owner._parameters[attribute] = nn.Parameter(shared.detach().clone())
        take_flags(owner._parameters[attribute], shared)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


def _register_zeros(owner: nn.Module, attribute: str, size: int) -> None:
    like = next(owner.parameters())
    value = torch.zeros(size, dtype=like.dtype, device=like.device)
    if attribute in owner._buffers:  # the constant part of a bias that a forward joins
        value = owner.get_buffer(attribute).detach().clone()
        delattr(owner, attribute)
    owner.register_parameter(attribute, nn.Parameter(value, requires_grad=like.requires_grad))
