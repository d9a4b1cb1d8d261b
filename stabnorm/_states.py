"""A state that is loaded is that of the same class, and it is loaded as a whole or not at all."""

import copy
from collections.abc import Callable, Collection, Mapping, Sized
from typing import Any, Protocol

from stabnorm._checks import shown
from stabnorm.errors import StabNormError


class Stateful(Protocol):
    """An object with a state."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: Any) -> None:
        """Continue from a state."""


def check_state(value: Any, of: str, parts: Collection[str], *, empty: bool = False) -> None:
    """Check a state that is to be loaded, before anything of it is.

    Args:
        value: what was given.
        of: whose state it is to be, for the message.
        parts: the entries that it must have.
        empty: whether one without entries will do, which says nothing. Default: False.

    Raises:
        TypeError: it is no mapping.
        ValueError: it lacks an entry.

    >>> check_state({}, "StabilityMonitor", ["steps_done"])
    Traceback (most recent call last):
    ...
    ValueError: the state lacks 'steps_done', so it is not one of StabilityMonitor. Give what its state_dict() returned
    """
    wanted = "what its state_dict() returned"
    if not isinstance(value, Mapping):
        raise TypeError(
            f"the state of {of} is a dict, got {shown(value)} of type {type(value).__name__}. Give {wanted}"
        )
    missing = [part for part in parts if part not in value]
    if missing and (value or not empty):
        raise ValueError(f"the state lacks {missing[0]!r}, so it is not one of {of}. Give {wanted}")


def check_one_each(values: Sized, names: Sized) -> None:
    """Check that a state has one value for each of these names.

    Raises:
        ValueError: it has more, or fewer.
    """
    if len(values) != len(names):
        raise ValueError(f"it has {len(values)} values for {len(names)} names")


def load_whole(owner: Stateful, load: Callable[[Any], None], state: Mapping[str, Any]) -> None:
    """Load a state; if that fails, the object continues from the state that it had.

    Args:
        owner: the object whose state is loaded.
        load: sets the object's attributes from a state.
        state: what was given.

    Raises:
        StabNormError: what `load` refuses in words of its own.
        ValueError: a value of the state cannot be read, as in a damaged checkpoint.
    """
    before = copy.deepcopy(owner.state_dict())
    try:
        load(state)
    except Exception as error:
        load(before)
        if isinstance(error, StabNormError):  # it says what to do
            raise
        raise ValueError(
            f"the state of {type(owner).__name__} is damaged, and nothing of it was loaded. Give what its state_dict() "
            f"returned ({type(error).__name__}: {error})"
        ) from error
