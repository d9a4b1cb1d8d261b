"""A failed call, or one more look at a model, leaves the model as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Let a model run once more as if it had not: what the run changes is put back, bit for bit.

    These are all buffers, the attributes of all modules (tensors, numbers, lists, dicts and sets, so also the states of
    metrics), and the gradients of the parameters, which have none inside. The numbers in the parameters are not copied.

    >>> model = nn.BatchNorm1d(2)
    >>> with put_back(model):
    ...     _ = model(torch.randn(5, 2))
    >>> model.running_mean, int(model.num_batches_tracked)
    (tensor([0., 0.]), 0)
    """
    tables = [(module, vars(module).copy(), _tables(module)) for module in model.modules()]
    held = [value for _, attributes, table in tables for value in (*attributes.values(), *table["_buffers"].values())]
    numbers = [(t, t.detach().clone()) for t in held if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
    containers = [(value, value.copy()) for value in held if isinstance(value, list | dict | set)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for module, attributes, table in tables:
            _put_back(vars(module), attributes)
            for name, content in table.items():
                _put_back(attributes[name], content)
        for container, content in containers:
            _put_back(container, content)
        with torch.no_grad():
            for tensor, values in numbers:
                tensor.copy_(values)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _put_back(container: Any, content: Any) -> None:
    """Make a container hold the very objects of a copy again, in their order; it is not touched where it does."""
    if isinstance(container, set):
        same = container == content
    elif isinstance(container, list):
        same = [id(item) for item in container] == [id(item) for item in content]
    else:
        now, before = ([(key, id(value)) for key, value in pairs.items()] for pairs in (container, content))
        same = now == before
    if not same:
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(content)


def _tables(module: nn.Module) -> dict[str, Any]:
    """Copy torch's own tables of parameters, buffers, children and hooks."""
    return {
        name: value.copy()
        for name, value in vars(module).items()
        if name.startswith("_") and isinstance(value, dict | set)
    }
