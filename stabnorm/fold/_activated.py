"""BatchNorms that do more than normalise, such as timm's ``BatchNormAct2d``: what they are in eval, by running them."""

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stabnorm._models.ambient import plain_context
from stabnorm._models.random_state import random_state_kept
from stabnorm.fold.folded import StandIn

_AXES = ((2,), (2, 3), (2, 3, 2), (2, 2, 3, 2))  # of the input, the channels left out


def affine_map_of(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Measure scale and shift of a module that keeps running statistics; None if it is no affine map per channel."""
    mean = getattr(module, "running_mean", None)
    if not isinstance(mean, Tensor) or mean.ndim != 1 or not isinstance(getattr(module, "running_var", None), Tensor):
        return None
    taken = _run(module, len(mean))
    if taken is None:
        return None
    (_, _, drawn), (shift, end, out) = taken
    shift, scale = _channels(shift), _channels(end) - _channels(shift)
    expected = _along(scale, drawn) * drawn + _along(shift, drawn)
    return (scale, shift) if torch.allclose(out, expected, rtol=1e-9, atol=1e-9) else None


def norm_inside(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Give scale and shift of a BatchNorm whose forward goes on with its children, one after the other; else None."""
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(module, _BatchNorm) or not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return None
    taken = _run(module, module.num_features)
    if taken is None:
        return None
    scale = torch.rsqrt(var.detach().double().cpu() + module.eps)
    if module.weight is not None:
        scale = scale * module.weight.detach().double().cpu()
    shift = -scale * mean.detach().double().cpu()
    if module.bias is not None:
        shift = shift + module.bias.detach().double().cpu()
    rest = nn.Sequential(*(copy.deepcopy(child) for child in module.children())).double().cpu()
    for x, y in zip(*taken, strict=True):
        with torch.no_grad(), random_state_kept(torch.device("cpu")):
            expected = rest(_along(scale, x) * x + _along(shift, x))
        if expected.shape != y.shape or not torch.allclose(y, expected, rtol=1e-9, atol=1e-9):
            return None
    return scale, shift


def standing_for(norm: nn.Module, new: StandIn, *, goes_on: bool, axes: Sequence[int] | None) -> nn.Module:
    """Give what takes a norm's place when `new` does its work; with `goes_on` the norm's children follow it."""
    new.in_place_of(norm).keep_memory(axes)
    if goes_on:
        children = OrderedDict(norm.named_children())
        for child in children.values():
            if getattr(child, "inplace", False):
                child.inplace = False  # type: ignore[assignment]  # it would write into what the norm read
        return nn.Sequential(OrderedDict([("norm", new), *children.items()]))
    return new


@plain_context()
def _run(module: nn.Module, channels: int) -> tuple[list[Tensor], list[Tensor]] | None:
    """Run a copy in float64 on zeros, ones and numbers that are drawn, in the first number of axes that it takes."""
    generator = torch.Generator().manual_seed(0)
    for first, *others in _AXES:
        drawn = torch.randn((first, channels, *others), generator=generator, dtype=torch.float64)
        inputs = [torch.zeros_like(drawn), torch.ones_like(drawn), drawn]
        try:
            twin = copy.deepcopy(module).double().cpu().eval()
            with random_state_kept(torch.device("cpu")):
                outputs = [twin(x.clone()) for x in inputs]
        except Exception:  # it takes another number of axes, or cannot be copied
            continue
        if all(isinstance(y, Tensor) and y.shape == x.shape for x, y in zip(inputs, outputs, strict=True)):
            return inputs, outputs
    return None


def _channels(t: Tensor) -> Tensor:
    return t.movedim(1, 0).flatten(1)[:, 0]


def _along(vector: Tensor, t: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (t.ndim - 2))
