"""Carry a plan out on a model: its numbers in float64, written in the parameters' own precision."""

import torch
from torch import Tensor, nn

from stabnorm.fold._plan import Edit, Plan
from stabnorm.fold._readers import NewBias, View
from stabnorm.fold._sites import Site
from stabnorm.fold.folded import FrozenAffine
from stabnorm.fold.manifest import restructure


@torch.no_grad()
def apply_plan(plan: Plan, manifest: dict[str, object], model: nn.Module) -> None:
    """Change weights and put what is left in the norms' places."""
    restructure(model, manifest)
    for name, (scale, shift, _) in plan.affine.items():
        frozen = model.get_submodule(f"{name}.norm" if name in plan.going_on else name)
        assert isinstance(frozen, FrozenAffine)
        frozen.scale.copy_(scale)
        frozen.shift.copy_(shift)
    for edit in plan.edits:
        _edit(model, edit)
    for site in plan.neutral:
        set_gain(model, site, torch.ones(()), torch.zeros(()))


def set_gain(model: nn.Module, site: Site, scale: Tensor, shift: Tensor) -> None:
    """Write gain and bias of a norm that stays."""
    assert site.gain is not None
    norm = model.get_submodule(site.name)
    for name, value in ((site.gain.weight, scale - site.gain.offset), (site.gain.bias, shift)):
        held = getattr(norm, name) if name else None
        if held is not None:
            held.data.copy_(value)


def _edit(model: nn.Module, edit: Edit) -> None:
    linear = edit.linear
    weight = linear.weight.of(model.get_parameter(linear.weight.name))
    in_scale, in_shift, out_scale, out_shift = (
        t.to(weight.device) for t in (edit.in_scale, edit.in_shift, edit.out_scale, edit.out_shift)
    )
    wide, kernel = weight.double(), [1] * (weight.ndim - 3)
    over_kernel = wide.reshape(*weight.shape[:3], -1).sum(-1)
    added = torch.einsum("gi,gio->go", in_shift, over_kernel)
    groups, inputs, outputs = weight.shape[:3]
    weight.copy_(wide * in_scale.view(groups, inputs, 1, *kernel) * out_scale.view(groups, 1, outputs, *kernel))
    bias = _bias(model, linear.bias, edit)
    if bias is not None:
        bias.copy_(out_scale * (bias.double() + added) + out_shift)


def _bias(model: nn.Module, slot: object, edit: Edit) -> Tensor | None:
    if isinstance(slot, View):
        return slot.of(model.get_parameter(slot.name))
    if isinstance(slot, NewBias) and edit.shifts:
        groups, _, outputs = edit.linear.size
        bias = model.get_parameter(f"{slot.owner}.{slot.attribute}" if slot.owner else slot.attribute)
        return bias[slot.start : slot.start + groups * outputs].view(groups, outputs)
    return None
