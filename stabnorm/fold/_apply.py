"""Carry a plan out on a model: its numbers in float64, written in the parameters' own precision."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stabnorm._models.ambient import plain_context
from stabnorm.fold._plan import Edit, Plan
from stabnorm.fold._readers import Joined, NewBias, Slot, View
from stabnorm.fold._sites import Site
from stabnorm.fold._ties import drop_ties
from stabnorm.fold.folded import FrozenAffine
from stabnorm.fold.manifest import restructure


@plain_context()
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
        set_gain(model, site, *(site.stays or (torch.ones(()), torch.zeros(()))))
    drop_ties(model, plan.untied)


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
    for bias, part in _biases(model, linear.bias, edit):
        bias.copy_(out_scale[:, part] * (bias.double() + added[:, part]) + out_shift[:, part])


def _biases(model: nn.Module, slot: Slot, edit: Edit) -> Iterator[tuple[Tensor, slice]]:
    """Give the parameters that hold a bias as ``[groups, outputs]``, and which outputs each holds."""
    groups, _, outputs = edit.linear.size
    if isinstance(slot, View):
        yield slot.of(model.get_parameter(slot.name)), slice(None)
    elif isinstance(slot, NewBias) and slot in edit.new_biases:
        yield slot.of(model)[slot.start : slot.start + groups * outputs].view(groups, outputs), slice(None)
    elif isinstance(slot, Joined):
        start = 0
        for each in slot.parts:
            count = math.prod(each.size) if isinstance(each, View) else each.size
            if isinstance(each, View):
                yield each.of(model.get_parameter(each.name)).view(1, -1), slice(start, start + count)
            elif each in edit.new_biases:
                yield each.of(model).view(1, -1), slice(start, start + count)
            start += count
