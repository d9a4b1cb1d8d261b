"""BatchNorms that do more than normalise, such as timm's ``BatchNormAct2d``: what they are in eval, by running them."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stabnorm._models.ambient import plain_context
from stabnorm._models.random_state import random_state_kept
from stabnorm._models.watched import own_class
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
    """Give scale and shift of a BatchNorm whose forward goes on behind it, with children or functions; else None."""
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
    rest = nn.Sequential(copy.deepcopy(_behind(module))).double().cpu()
    for x, y in zip(*taken, strict=True):
        with torch.no_grad(), random_state_kept(torch.device("cpu")):
            expected = rest(_along(scale, x) * x + _along(shift, x))
        if expected.shape != y.shape or not torch.allclose(y, expected, rtol=1e-9, atol=1e-9):
            return None
    return scale, shift


def standing_for(norm: nn.Module, new: StandIn, *, goes_on: bool, axes: Sequence[int] | None) -> nn.Module:
    """Give what takes a norm's place when `new` does its work; with `goes_on` the rest of its forward follows it."""
    new.in_place_of(norm).keep_memory(axes)
    return nn.Sequential(OrderedDict([("norm", new), *_behind(norm).items()])) if goes_on else new


def _behind(norm: nn.Module) -> "OrderedDict[str, nn.Module]":
    """List what a norm's forward does with its output: its own code, where that calls ``super``, else its children."""
    if "__class__" in _code_of(type(norm).forward).co_freevars:
        return OrderedDict(rest=Rest.of(norm))
    children = OrderedDict(norm.named_children())
    for child in children.values():
        if getattr(child, "inplace", False):
            child.inplace = False  # type: ignore[assignment]  # it would write into what the norm read
    return children


def _code_of(function: Any) -> CodeType:
    code: CodeType = inspect.unwrap(function).__code__
    return code


class Rest(nn.Identity):
    """A norm's own forward without the norm: there ``super().forward`` returns its input.

    Every instance belongs to a subclass that `rest_class` makes of the norm's class.
    """

    @classmethod
    def of(cls, norm: nn.Module) -> "Rest":
        """Make one from a norm, with the norm's children and plain attributes."""
        rest = _blank(own_class(norm))
        held = {**vars(norm), "_parameters": {}, "_buffers": {}, "_modules": dict(norm._modules)}
        kept = {name: value for name, value in held.items() if "_hooks" not in name}
        vars(rest).update(kept, training=norm.training)
        return rest

    def extra_repr(self) -> str:
        """Name the class."""
        return str(type(self).__mro__[1].__name__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__mro__[1],), self.__dict__  # pickle cannot find the class by its name


@cache
def rest_class(cls: type[nn.Module]) -> type[Rest]:
    """Make the class that is `cls` without the norm of torch's that it derives from."""
    norm = next(base for base in cls.__mro__ if base.__module__.startswith("torch."))
    return type("Rest", (cls, type("Rest", (Rest, norm), {})), {"extra_repr": Rest.extra_repr})  # type: ignore[return-value]


def _blank(cls: Any) -> Rest:
    made = rest_class(cls)
    rest = made.__new__(made)
    nn.Module.__init__(rest)
    return rest


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
