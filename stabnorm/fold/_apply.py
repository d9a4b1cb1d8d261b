"""Carry a plan out on a model: its numbers in float64, written in the parameters' own precision."""

import torch
from torch import Tensor, nn

from stabnorm.fold._plan import Edit, Plan
from stabnorm.fold._readers import NewBias, View
from stabnorm.fold.folded import FrozenAffine
from stabnorm.fold.manifest import restructure


@torch.no_grad()
def apply_plan(plan: Plan, manifest: dict[str, object], model: nn.Module) -> None:
    """Change weights and put what is left in the norms' places."""
    restructure(model, manifest)
    for name, (scale, shift, _) in plan.affine.items():
        frozen = model.get_submodule(name)
        assert isinstance(frozen, FrozenAffine)
        frozen.scale.copy_(scale)
        frozen.shift.copy_(shift)
    for edit in plan.edits:
        _edit(model, edit)


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
