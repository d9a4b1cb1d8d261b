"""Which argument of a call is a norm's input, and which is its mask.

A norm may be called as ``norm(x)``, ``norm(hidden_states=x)`` or ``norm(mask=mask, x=x)``. Whoever hooks a norm asks
here which of these arguments the norm normalises; where a `NormLayer` is at hand, its `input_of` knows the name.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def input_name(module: nn.Module) -> str:
    """Give the name that the module's `forward` has for its first argument; "" where it has none.

    >>> input_name(nn.LayerNorm(4))
    'input'
    """
    try:
        first = next(iter(inspect.signature(module.forward).parameters.values()), None)
    except (AttributeError, TypeError, ValueError):  # a scripted module's forward may have no signature
        return ""
    return first.name if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD else ""


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any], name: str = "") -> Any:
    """Find a module's input among the arguments of a call.

    It is the first positional argument; else the keyword argument of this name; else the only keyword argument; else
    the first floating tensor among them, for a `forward` that takes its input by more than one name.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        name: what `forward` calls its input, see `input_name`. Default: unknown.

    Returns:
        The input; None where the call has none.

    >>> import torch
    >>> x = torch.ones(2, 3)
    >>> input_of((), {"mask": x > 0, "x": x}) is x
    True
    """
    if args:
        return args[0]
    if name in kwargs:
        return kwargs[name]
    if len(kwargs) == 1:
        return next(iter(kwargs.values()))
    for value in kwargs.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def tensor_input_of(args: Sequence[Any], kwargs: Mapping[str, Any], name: str = "") -> Tensor:
    """Find a norm's input among the arguments of a call, see `input_of`.

    Raises:
        TypeError: the call has no tensor for an input.
    """
    x = input_of(args, kwargs, name)
    if not isinstance(x, Tensor):
        raise TypeError(f"a norm reads a tensor, and this call has {type(x).__name__}. Pass it first, or by keyword")
    return x


def mask_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Find the mask in a call of one of this package's norms, ``forward(x, mask=None)``.

    >>> mask_of(("x", "mask"), {}), mask_of((), {"mask": "mask", "x": "x"}), mask_of(("x",), {})
    ('mask', 'mask', None)
    """
    return args[1] if len(args) > 1 else kwargs.get("mask")
