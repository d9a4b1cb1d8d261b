"""A failed call leaves a model as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def intact_on_error(model: nn.Module) -> Iterator[None]:
    """Put back every class, attribute, parameter, buffer, child and hook of a model if the body raises.

    The numbers in a tensor are not copied: whoever changes numbers does it last, or puts new tensors in their place.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> try:
    ...     with intact_on_error(model):
    ...         model[0] = nn.Identity()
    ...         raise RuntimeError
    ... except RuntimeError:
    ...     print(model[0])
    Linear(in_features=2, out_features=2, bias=True)
    """
    before = [(module, type(module), vars(module).copy(), _tables(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, attributes, tables in before:
            object.__setattr__(module, "__class__", cls)  # past a __setattr__ of the class's own
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in tables.items():
                table = attributes[name]  # the same object: the handles that remove a hook refer to it
                table.clear()
                table.update(content)
        raise


def _tables(module: nn.Module) -> dict[str, Any]:
    """Copy torch's own tables of parameters, buffers, children and hooks."""
    return {
        name: value.copy()
        for name, value in vars(module).items()
        if name.startswith("_") and isinstance(value, dict | set)
    }
