"""Which modules a user means: regular expressions that are searched for in names."""

import re
from collections.abc import Sequence

from stabnorm._checks import is_collection, wrong_type

Patterns = str | Sequence[str] | None


class NameFilter:
    """Which names match one pattern of `include` and none of `exclude`.

    Args:
        include: a regular expression, or several; None: every name.
        exclude: the same for names to leave out; it wins over `include`. None: no name.

    Raises:
        TypeError: a pattern is no string.
        ValueError: a pattern is no regular expression.

    >>> wanted = NameFilter(include="norm", exclude=[r"^head"])
    >>> [name for name in ("blocks.norm", "head.norm", "blocks.fc") if wanted(name)]
    ['blocks.norm']
    """

    def __init__(self, include: Patterns = None, exclude: Patterns = None) -> None:
        self._include = None if include is None else compiled("include", include)
        self._exclude = [] if exclude is None else compiled("exclude", exclude)

    def __call__(self, name: str) -> bool:
        included = self._include is None or any(pattern.search(name) for pattern in self._include)
        return included and not any(pattern.search(name) for pattern in self._exclude)


def compiled(argument: str, given: str | Sequence[str]) -> list[re.Pattern[str]]:
    """Compile what was given for an argument, one regular expression or several.

    Raises:
        TypeError: one is no string.
        ValueError: one is no regular expression.
    """
    wanted = "a regular expression as a string, or a list of them"
    if not is_collection(given):
        raise wrong_type(argument, given, wanted)
    patterns = []
    for pattern in [given] if isinstance(given, str) else given:
        if not isinstance(pattern, str):
            raise wrong_type(argument, given, wanted)
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"{argument}={pattern!r} is not a valid regular expression: {error}. "
                "It is searched for in the layers' names; write '.*' for anything."
            ) from error
    return patterns
