"""Lazy exports: a package names what it offers, and a module is imported only when one of its names is used."""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def lazy_exports(
    package: str, homes: Mapping[str, Sequence[str]], parts: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make the `__getattr__`, `__dir__` and `__all__` of a package.

    The package repeats its exports under `TYPE_CHECKING`, where type checkers and editors read them; a test compares
    the two lists. A name must differ from the names of the package's modules, because importing a module sets an
    attribute of the package.

    Args:
        package: the package's `__name__`.
        homes: the modules, in full, and the names that each of them offers.
        parts: packages inside it that are attributes of it, too; they are not in `__all__`. Default: none.

    >>> getattr_, dir_, all_ = lazy_exports("stabnorm.errors", {"stabnorm.errors": ["StabNormError"]})
    >>> all_, getattr_("StabNormError").__name__
    (['StabNormError'], 'StabNormError')
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in parts:
            return importlib.import_module(f"{package}.{name}")
        if name not in home_of:
            from stabnorm._checks import nearest

            hint = "" if name.startswith("_") else nearest(name, (*home_of, *parts))
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")
        return getattr(importlib.import_module(home_of[name]), name)

    return get, public_names(package, (*home_of, *parts)), sorted(home_of)


def public_names(package: str, names: Iterable[str]) -> Callable[[], list[str]]:
    """Make the `__dir__` of a package: what it offers, without what it imports for itself.

    Args:
        package: the package's `__name__`.
        names: what it offers.
    """

    def listed() -> list[str]:
        of_every_module = (name for name in vars(importlib.import_module(package)) if name.startswith("__"))
        return sorted({*of_every_module, *names})

    return listed
