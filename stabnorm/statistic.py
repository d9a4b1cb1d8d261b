"""`Statistic`: one number per row and step, whoever measures it; and how statistics are asked for and listed by name.

The rows are norms in the monitor, and heads, matrices or other things in its companions.
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

if TYPE_CHECKING:
    from torch import Tensor

Axis = Literal["channel", "token", "layer", "gradient", "parameter", "depth"]
Needs = Literal[
    "tokens", "normalized", "gradients", "token_shape", "values", "sequences", "outputs", "parameters", "optimizer",
]  # fmt: skip
NEEDS: tuple[str, ...] = get_args(Needs)

FREE = "free from the channel moments"
TOKENS = "one pass for mean and variance of the tokens"
MEDIANS = "a sort of each token, and six passes"
PARAMETERS = "gains and biases, once a step"


Moment = TypeVar("Moment")
Value = TypeVar("Value")
Item = TypeVar("Item")


def per_step(function: Callable[[Moment], Value]) -> Callable[[Moment], Value]:
    """Compute once per step what several statistics build on; the value is kept with the step's moments."""
    name = f"{function.__module__}.{function.__qualname__}"  # no attribute of the moments has such a name

    @functools.wraps(function)
    def kept(now: Moment) -> Value:
        memory = vars(now)
        if name not in memory:
            memory[name] = function(now)
        value: Value = memory[name]
        return value

    return kept


def undefined(now: Any, past: Any) -> "Tensor":
    """Stand in for the function of a statistic that was given none."""
    raise NotImplementedError


@dataclass(frozen=True)
class Statistic:
    """One number per row and step: a row of the catalogue, one of a companion's, or one of your own.

    A name and a function are enough. The function sees all rows at once, and must not read a value from the device.

    Attributes:
        name: as in `history()`, in tags and in alerts; letters, digits and underscores.
        number: its number in the literature survey.
        formula: what it is; c runs over channels, n over tokens, hats are the layer's past.
        axis: "channel": from moments over tokens (BatchNorm's view); "token": from moments over channels (LayerNorm's);
            "layer", "gradient", "parameter", "depth": over the layers before this one, too.
        unit: "1": dimensionless; "x": that of the layer's input; "x^2"; "token": a number of tokens; "gradient"; in a
            companion also "nat", "rad", "weight", "logit", ...
        source: where it comes from.
        cost: what it costs beyond the channel moments.
        compute: ``(now, past) -> [rows]``, a floating tensor. Of norms, `now` are the step's merged `Moments` (or
            `DetailedMoments`) and `past` is the `Past` before the step; of a companion, `now` are its merged sums and
            `past` is None.
        needs: what must be gathered for it beside the channel moments, one or several of: "tokens" (`Moments.token`),
            "normalized" (`mean_n`, `var_n`, `cov_xn`), "gradients" (`gradient`); "token_shape", "values", "sequences",
            "outputs" (`DetailedMoments.detail`: means, counts, sequences, outputs), "parameters", "optimizer" (`adam`).
            Default: nothing.
        threshold: beyond this the literature (or we, where `source` says so) calls it bad; for the closing table.
        alarm: beyond this an alert is raised at once, with no past needed.
        floor: not None: a robust z-score of its logarithm against the row's own past is watched, and this is the
            least scale, in log units: 6 floors are the smallest change that can raise an alert.
        advice: what it means when it is over its bound, and where to look.
        least: below this it is bad, as `threshold` beyond.
        remembers: it needs what `DetailedPast` keeps, beyond `Past`.
        bad: when the literature calls it bad, where no bound says it.

    >>> Statistic("mean_power", compute=lambda now, past: now.mean_over_channels(now.second_moment)).needs_all
    frozenset()
    >>> Statistic("logit", threshold=100.0, alarm=1e4).bad_when
    '> 100, alert > 10000'
    """

    name: str
    number: str = "own"
    formula: str = ""
    axis: Axis = "layer"
    unit: str = "1"
    source: str = ""
    cost: str = ""
    compute: "Callable[[Any, Any], Tensor]" = undefined
    needs: Needs | tuple[Needs, ...] | None = None
    threshold: float | None = None
    alarm: float | None = None
    floor: float | None = None
    advice: str = ""
    least: float | None = None
    remembers: bool = False
    bad: str = ""

    @property
    def needs_all(self) -> frozenset[str]:
        """`needs` as a set."""
        return frozenset((self.needs,) if isinstance(self.needs, str) else self.needs or ())

    @property
    def bad_when(self) -> str:
        """Its bounds in words, for the documentation."""
        bounds = [f"> {self.threshold:g}"] if self.threshold is not None and self.threshold != self.alarm else []
        if self.least is not None:
            bounds.append(f"< {self.least:g}")
        if self.alarm is not None:
            bounds.append(f"alert > {self.alarm:g}")
        if self.floor is not None:
            bounds.append(f"alert: x{math.exp(6 * self.floor):.2g} and 6 robust sigmas off its past")
        return self.bad or ", ".join(bounds) or "no bound; compare layers and steps"


def by_name(asked: Any, known: Mapping[str, Item], kind: type[Any], word: str) -> Item:
    """Return what was asked for: an object of the kind as it is, or the known one of that name.

    Args:
        asked: a name or an object.
        known: what can be asked for by name.
        kind: the class of such objects.
        word: what messages call one.

    Raises:
        ValueError: the name is unknown; the message suggests the nearest one.
        TypeError: it is neither a name nor such an object.

    >>> by_name("amx", {"amax": 1.0}, float, "statistic")
    Traceback (most recent call last):
    ...
    ValueError: unknown statistic 'amx'; did you mean 'amax'?; known: amax
    """
    if isinstance(asked, kind):
        item: Item = asked
        return item
    if not isinstance(asked, str):
        names = ", ".join(known)
        raise TypeError(f"a {word} is a name or an object of class {kind.__name__}, got {asked!r}; names: {names}")
    if asked not in known:
        raise ValueError(f"unknown {word} {asked!r}{nearest(asked, known)}; known: {', '.join(known)}")
    return known[asked]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest of those that are known, if one is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""A table for the documentation; a ``|`` in a cell is escaped.

    >>> print(markdown_table(["statistic", "formula"], [("amax", "max |x|")]))
    | statistic | formula |
    |---|---|
    | amax | max \|x\| |
    """
    body = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *body])
