"""What a user's argument must be: one check for each kind of argument, called where the user's call arrives.

Each check takes the argument's name and its value. It raises TypeError for a value of another type, and ValueError for
one that is out of range. The message has the name, the value, and what to give instead. This file loads where torch is
missing; a check of something of torch's imports it.
"""

import difflib
import inspect
import math
import numbers
import operator
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

Item = TypeVar("Item")


def nearest(name: Any, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name, which suggests the nearest known name if there is one.

    >>> nearest("Adaptiv", ["linear", "adaptive"])
    "; did you mean 'adaptive'?"
    """
    lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1) if isinstance(name, str) else []
    return f"; did you mean {lower[close[0]]!r}?" if close else ""


def shown(value: Any) -> str:
    """Return a value for a message: its `repr` on one line, and not the whole of a long one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def wrong_type(name: str, value: Any, wanted: str) -> TypeError:
    """Return the error for a value of the wrong type.

    Args:
        name: of the argument.
        value: what was given.
        wanted: what to give, after "Give ".
    """
    return TypeError(f"{name}={shown(value)} is {_kind(value)}. Give {wanted}")


def wrong_item(name: str, value: Any, wanted: str) -> TypeError:
    """Return the error for one item of a list.

    Args:
        name: of the list.
        value: the item.
        wanted: what to give, after "Give ".
    """
    return TypeError(f"{name} holds {shown(value)}, which is {_kind(value)}. Give {wanted}")


def _kind(value: Any) -> str:
    return f"the class {value.__name__} itself" if isinstance(value, type) else f"of type {type(value).__name__}"


def check_choice(name: str, value: Any, known: Collection[Any], hint: str = "") -> None:
    """Check a value that is chosen from a list; the error suggests the nearest one.

    Args:
        name: of the argument.
        value: what was given.
        known: what there is to choose from.
        hint: what else may be given, for the end of the message.

    Raises:
        ValueError: `value` is not among the known ones.

    >>> check_choice("to", "PRepBM", ["prepbn", "repbn"])
    Traceback (most recent call last):
    ...
    ValueError: to='PRepBM' is unknown. Choose one of 'prepbn', 'repbn'; did you mean 'prepbn'?
    """
    if not any(type(value) is type(one) and value == one for one in known):
        choices = ", ".join(map(repr, known))
        raise ValueError(
            f"{name}={shown(value)} is unknown. Choose one of {choices}{hint}{nearest(value, _names(known))}"
        )


def check_names(what: str, names: Any, known: Collection[str]) -> None:
    """Check the names of keyword arguments or of the entries of a dict.

    Args:
        what: whose names they are, for the message, such as "fold_norms".
        names: a mapping with these names.
        known: the names that there are.

    Raises:
        TypeError: it is no mapping, or has another name; the message suggests the nearest one.

    >>> check_names("RepBN", {"epps": 1}, ["eps", "momentum"])
    Traceback (most recent call last):
    ...
    TypeError: RepBN has no option 'epps'. It takes eps, momentum; did you mean 'eps'?
    """
    if not isinstance(names, Mapping):
        raise TypeError(f"the options of {what} are a dict, got {shown(names)} of type {type(names).__name__}")
    for name in names:
        if name not in known:
            choices = ", ".join(sorted(known))
            raise TypeError(f"{what} has no option {shown(name)}. It takes {choices}{nearest(name, known)}")


def _names(known: Iterable[Any]) -> list[str]:
    return [one for one in known if isinstance(one, str)]


# --- numbers ---


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    hint: str = "",
) -> None:
    """Check a finite number.

    Args:
        name: of the argument.
        value: what was given.
        least: the smallest value that is allowed. Default: any.
        above: a value that must be exceeded. Default: any.
        most: the largest value that is allowed. Default: any.
        hint: what else may be given, or what is usual, for the end of the message.

    Raises:
        TypeError: it is no real number.
        ValueError: it is not finite, or out of range.

    >>> check_number("momentum", 5, least=0, most=1)
    Traceback (most recent call last):
    ...
    ValueError: momentum=5 is out of range. Give a number from 0 to 1
    """
    wanted = f"a number{_range(least, above, most)}{hint}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise wrong_type(name, value, wanted)
    number = float(value)
    too_small = (least is not None and number < least) or (above is not None and number <= above)
    if not math.isfinite(number) or too_small or (most is not None and number > most):
        raise ValueError(f"{name}={value!r} is out of range. Give {wanted}")


def _range(least: float | None, above: float | None, most: float | None) -> str:
    if least is not None:
        return f" from {least:g} to {most:g}" if most is not None else f" of {least:g} or more"
    if above is not None:
        return f" above {above:g}" + (f", and {most:g} at most" if most is not None else "")
    return "" if most is None else f" of {most:g} or less"


def check_count(name: str, value: Any, least: int = 1, *, hint: str = "") -> None:
    """Check a whole number of something.

    Args:
        name: of the argument.
        value: what was given.
        least: the smallest value that is allowed. Default: 1.
        hint: what else may be given, or what it counts, for the end of the message.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is smaller than `least`, or larger than any index.

    >>> check_count("steps", 1.5)
    Traceback (most recent call last):
    ...
    TypeError: steps=1.5 is of type float. Give a whole number of 1 or more
    """
    wanted = f"a whole number of {least} or more{hint}"
    if not is_whole(value):
        raise wrong_type(name, value, wanted)
    if not least <= operator.index(value) <= sys.maxsize:
        raise ValueError(f"{name}={value!r} is out of range. Give {wanted}")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python's or of another library's; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_axis(name: str, value: Any) -> None:
    """Check the axis of the channels.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is 0, the batch.
    """
    if not is_whole(value):
        raise wrong_type(name, value, "the axis that holds the channels, usually -1 or 1")
    if value == 0:
        raise ValueError(f"{name}=0 is the batch. Give the axis that holds the channels, usually -1 or 1")


def check_flag(name: str, value: Any) -> None:
    """Check that a value is True or False; 1 and 0 mean the same.

    Raises:
        TypeError: it is something else.
    """
    is_flag = type(value).__name__ in ("bool", "bool_")  # Python's and NumPy's
    if not is_flag and not (isinstance(value, int) and value in (0, 1)):
        raise wrong_type(name, value, "True or False")


def check_scalar(name: str, value: Any, **limits: Any) -> None:
    """Check one number that may be a tensor of one element; a tensor's value is not read.

    Args:
        name: of the argument.
        value: what was given.
        **limits: of `check_number`, for a number. Default: any number will do, also NaN.

    Raises:
        TypeError: it is neither a number nor a tensor.
        ValueError: it is a tensor of several elements, or out of range.
    """
    from torch import Tensor

    if isinstance(value, Tensor):
        if value.numel() != 1:
            shape = tuple(value.shape)
            raise ValueError(f"{name} is one number, got a tensor of shape {shape}; use {name}.mean(), for example")
        if value.is_complex():
            raise wrong_type(name, value, f"a real number, such as {name}.abs()")
    elif not isinstance(value, numbers.Real):
        raise wrong_type(name, value, "a number or a tensor of one element")
    elif limits:
        check_number(name, value, **limits)


# --- objects ---


def check_model(name: str, value: Any) -> None:
    """Check that a value is a module.

    Raises:
        TypeError: it is something else.

    >>> import torch
    >>> check_model("model", torch.nn.Linear)
    Traceback (most recent call last):
    ...
    TypeError: model=<class 'torch.nn.modules.linear.Linear'> is the class Linear itself. Give an nn.Module: build it...
    """
    from torch import nn

    if not isinstance(value, nn.Module):
        first = ": build it first" if isinstance(value, type) else ""
        raise wrong_type(name, value, f"an nn.Module{first}")


def check_has_numbers(model: Any, purpose: str) -> None:
    """Check that all parameters and buffers of a model hold numbers.

    Args:
        model: a module.
        purpose: what the numbers are for, such as "to fold".

    Raises:
        StabNormError: one is on the meta device, or does not know its size yet.
    """
    from torch.nn.parameter import is_lazy

    from stabnorm.errors import StabNormError

    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise StabNormError(
                f"{name!r} of the model does not know its size yet, so there are no numbers {purpose}. Run one batch "
                "through the model first"
            )
        if tensor.is_meta:
            raise StabNormError(
                f"{name!r} of the model is on the meta device, where there are no numbers {purpose}. Move the model "
                "with to_empty() and load its weights first"
            )


def check_instance(name: str, value: Any, kind: type[Any] | tuple[type[Any], ...], wanted: str) -> None:
    """Check the class of a value.

    Args:
        name: of the argument.
        value: what was given.
        kind: the class, or several.
        wanted: what to give, in words, for the message.

    Raises:
        TypeError: it is of another class.
    """
    if not isinstance(value, kind):
        raise wrong_type(name, value, wanted)


def is_collection(value: Any) -> bool:
    """Whether a value is a string or a collection of several things, and not an array or a tensor."""
    return isinstance(value, Collection) and not isinstance(value, bytes) and not hasattr(value, "ndim")


def check_all(name: str, values: Any, kind: type[Any], wanted: str) -> None:
    """Check the class of each item of a sequence.

    Args:
        name: of the argument.
        values: what was given; it must not be an iterator, because this check would use it up.
        kind: the class of an item.
        wanted: what to give, in words, for the message.

    Raises:
        TypeError: it is no collection, or an item is of another class.
    """
    if isinstance(values, str) or not is_collection(values):
        raise wrong_type(name, values, wanted)
    for value in values:
        if not isinstance(value, kind):
            raise wrong_item(name, value, wanted)


def list_of(name: str, values: Any, kind: type[Item]) -> list[Item]:
    """Return the modules that were given as a list.

    Args:
        name: of the argument.
        values: what was given, an iterable of modules.
        kind: their class.

    Raises:
        TypeError: it cannot be iterated over, or an item is of another class.
    """
    wanted = f"a list of {kind.__name__} modules, as convert_norms makes them"
    if not isinstance(values, Iterable) or hasattr(values, "ndim"):
        raise wrong_type(name, values, wanted)
    listed = list(values)
    for value in listed:
        if not isinstance(value, kind):
            raise wrong_item(name, value, wanted)
    return listed


def check_function(name: str, value: Any, *arguments: str) -> None:
    """Check that a value can be called with these arguments.

    Args:
        name: of the argument.
        value: what was given.
        *arguments: what it will be called with, for the message.

    Raises:
        TypeError: it cannot be called, or takes another number of arguments.

    >>> check_function("forward", lambda batch: batch, "model", "batch")
    Traceback (most recent call last):
    ...
    TypeError: forward=<function <lambda> at ...> cannot be called so. Give a function of (model, batch)
    """
    wanted = f"a function of ({', '.join(arguments)})"
    if not callable(value):
        raise wrong_type(name, value, wanted)
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # what is written in C need not say what it takes
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name}={shown(value)} cannot be called so. Give {wanted}") from error


def check_loader(name: str, value: Any) -> None:
    """Check that a value gives batches.

    Raises:
        TypeError: it cannot be iterated over, or it is a single batch.
    """
    from torch import nn

    wanted = "a DataLoader or a list of batches"
    if isinstance(value, Mapping) or hasattr(value, "ndim"):
        raise wrong_type(name, value, f"{wanted}: [batch] is a list of one")
    iterable = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    if not iterable or isinstance(value, str | bytes | type | nn.Module):
        raise wrong_type(name, value, wanted)
