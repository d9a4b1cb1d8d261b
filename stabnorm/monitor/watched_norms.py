"""`WatchedNorms`: the norms of a model that a monitor watches, and what has become of them since."""

import functools
import warnings
from collections.abc import Sequence

from torch import nn

from stabnorm._log import printable
from stabnorm.monitor.outputs import say
from stabnorm.norms import NormLayer, find_norms


class WatchedNorms:
    """The norms of a model that a monitor watches, in depth order.

    Args:
        model: the model, without wrappers.
        include: a regular expression, or a list of them, that a norm's name must match. Default: all.
        exclude: the same for norms to leave out. Default: none.

    Raises:
        ValueError: there is no norm to watch.

    >>> model = nn.Sequential(nn.LayerNorm(8))
    >>> watched = WatchedNorms(model)
    >>> model[0] = nn.Identity()
    >>> [norm.name for norm in watched.norms], watched.changes()
    (['0'], '0 left the model')
    """

    def __init__(
        self,
        model: nn.Module,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> None:
        self._model, self._find = model, functools.partial(find_norms, model, include=include, exclude=exclude)
        self.norms = _of_known_width(self._find())
        if not self.norms:
            narrowed = f" with include={include!r}, exclude={exclude!r}" if include or exclude else ""
            raise ValueError(
                f"no normalization layer found in {type(model).__name__}{narrowed}: nothing to monitor. If it has "
                "norms of its own, tell stabnorm with stabnorm.register_norm"
            )
        self._told = ""

    def changes(self) -> str:
        """Return which norms have left the model, and which came into it; "" if none did."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what looks like a norm was named at the start
            now = {id(norm.module): norm.name for norm in self._find() if norm.num_features}
        watched = {id(norm.module): norm.name for norm in self.norms}
        present = set(map(id, self._model.modules()))
        gone = [name for module, name in watched.items() if module not in present]
        new = [name for module, name in now.items() if module not in watched]
        parts = [f"{', '.join(gone)} left the model"] * bool(gone) + [f"{', '.join(new)} came into it"] * bool(new)
        return ", and ".join(parts)

    def tell_changes(self) -> None:
        """Warn of `changes` that were not told yet."""
        changes = self.changes()
        if changes and changes != self._told:
            say(
                "stabnorm: after the monitor was attached, %s: what came later is not watched. Make a new monitor, or "
                "change the model before the training starts",
                changes,
            )
        self._told = changes


def _of_known_width(norms: Sequence[NormLayer]) -> list[NormLayer]:
    """Leave out the norms whose number of channels nothing tells, because there is no room for their sums; say so."""
    unknown = [norm for norm in norms if not norm.num_features]
    if unknown:
        example = f"stabnorm.register_norm({type(unknown[0].module).__name__}, {unknown[0].kind!r}, num_features=...)"
        say(
            "stabnorm: nothing tells how many channels %s normalises, so it is not watched. Give the number to the "
            "norm, as an attribute num_features, or register its class with %s",
            ", ".join(printable(norm.name) or "the model itself" for norm in unknown),
            example,
        )
    return [norm for norm in norms if norm.num_features]
