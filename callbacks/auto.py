"""`STABNORM_AUTO=1 python train.py` adds a `StabilityCallback` to every Trainer, without a line of code.

Lightning calls `callbacks_of_environment` whenever a Trainer is built, because this package names it as a callback
factory. While the variable is not set, it imports nothing and returns no callback. Options of the callback are given as
``STABNORM_AUTO='preset=full, flush_every=20, companions=[attention, weights]'``.
"""

import ast
import os
import re
from typing import Any

VARIABLE = "STABNORM_AUTO"
OFF = ("", "0", "false", "off", "no")
ON = ("1", "true", "on", "yes")


def callbacks_of_environment() -> list[Any]:
    """Return the callback that the variable asks for, in a list; an empty list if it is not set.

    Raises:
        TypeError: the variable names an option that there is not, or gives one a value of another type.
        ValueError: it has no options in it, or one is out of range.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text.lower() in OFF:
        return []
    options = {} if text.lower() in ON else read_options(text)
    from stabnorm.callbacks._step_aside import AutoStabilityCallback

    return [AutoStabilityCallback(**options)]


def read_options(text: str) -> dict[str, Any]:
    """Read options as they are written in the variable: ``name=value``, separated by commas.

    A value is a number, True, False, None, a list in brackets, or else a string, which needs no quotes.

    Raises:
        TypeError: there is no such option.
        ValueError: it is not written so.

    >>> read_options("preset=full, flush_every=20, exclude=[head.*, '^stem']")
    {'preset': 'full', 'flush_every': 20, 'exclude': ['head.*', '^stem']}
    """
    from stabnorm._checks import check_names

    options: dict[str, Any] = {}
    for part in re.split(r",(?=\s*[A-Za-z_]+\s*=)", text):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(
                f"{VARIABLE}={text!r} is neither 1 nor options. Write them as {VARIABLE}='preset=full, flush_every=20'"
            )
        options[name.strip()] = _value(value.strip())
    known = ("preset", "flush_every", "include", "exclude", "gradients", "mask", "companions", "fused", "budget")
    check_names(VARIABLE, options, known)
    return options


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        if text.startswith("[") and text.endswith("]"):
            return [_value(part.strip()) for part in text[1:-1].split(",") if part.strip()]
        return text
