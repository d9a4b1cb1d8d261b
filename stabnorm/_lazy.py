"""Lazy exports: a package names what it offers, and a module is imported only when one of its names is used."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make the `__getattr__`, `__dir__` and `__all__` of a package.

    The package repeats its exports under `TYPE_CHECKING`, where type checkers and editors read them; a test compares
    the two lists. A name must differ from the names of the package's modules, because importing a module sets an
    attribute of the package.

    Args:
        package: the package's `__name__`.
        homes: the modules, in full, and the names that each of them offers.

    >>> getattr_, dir_, all_ = lazy_exports("stabnorm.errors", {"stabnorm.errors": ["StabNormError"]})
    >>> all_, getattr_("StabNormError").__name__
    (['StabNormError'], 'StabNormError')
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home_of[name]), name)

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *home_of})

    return get, names, sorted(home_of)
