"""`Statistic`: one number per row and step, of the monitor or of a companion; and how statistics are chosen by name.

The rows are norms in the monitor, and heads, matrices or other things in its companions.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from stabnorm._checks import nearest

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
    """Compute a value that several statistics need only once per step, and keep it with the step's moments."""
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

    A name and a function are enough. The function sees all rows at once, norms in groups of like width, and must not
    read a value from the device.

    Attributes:
        name: as in `history()`, in tags and in alerts; letters, digits and underscores.
        number: its number in the literature survey.
        formula: its formula; c is a channel, n a token, and a hat means the layer's past.
        axis: "channel" for moments over tokens (as in BatchNorm), "token" for moments over channels (as in LayerNorm),
            "layer", "gradient", "parameter", or "depth" if it also depends on the layers before this one.
        unit: "1" for a dimensionless number, "x" for the unit of the layer's input, "x^2", "token" for a number of
            tokens, "gradient"; in a companion also "nat", "rad", "weight", "logit" and others.
        source: publication or other origin.
        cost: its cost in addition to the channel moments.
        compute: ``(now, past) -> [rows]``, a floating tensor. Of norms, `now` are the step's merged `Moments` (or
            `DetailedMoments`) and `past` is the `Past` before the step; of a companion, `now` are its merged sums and
            `past` is None.
        needs: the data that it needs beside the channel moments, one or several of: "tokens" (`Moments.token`),
            "normalized" (`mean_n`, `var_n`, `cov_xn`), "gradients" (`gradient`); "token_shape", "values", "sequences",
            "outputs" (`DetailedMoments.detail`: means, counts, sequences, outputs), "parameters", "optimizer" (`adam`).
            Default: nothing.
        threshold: a value above it is bad according to `source`; the table at the end of a training shows such a row.
        alarm: a value above it raises an alert at once, without any past.
        crosses: with `alarm`, whether the value must have been below it for 100 steps before it raises an alert,
            because a model may be built with a value above it. Default: False.
        floor: if not None, a robust z-score of its logarithm against the row's own past is watched. The floor is the
            smallest scale of this z-score, in log units: a change must exceed 6 floors to raise an alert.
        negligible: with `floor`, a value below it counts as this one, because changes there do not matter. Default: 0.
        harmless: with `floor`, a rise counts only beyond this value, to which the value may climb. Default: 0.
        drifts: with `floor`, whether it moves slowly in a healthy training, so that it is compared with the last 128
            steps only and not with the last 1024. Default: False.
        advice: what a value beyond the bound means, and where to look.
        least: a value below it is bad, as one above `threshold` is.
        upward: whether only a rise above the past raises an alert, as for gradients, which fall after a spike.
        start: a value above it in three quarters of the rows raises an alert as long as there is no past. Default: no
            such bound.
        remembers: whether it needs `DetailedPast` instead of `Past`.
        bad: when it is bad, in words, for a statistic without a bound.

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
    upward: bool = False
    start: float | None = None
    negligible: float = 0.0
    harmless: float = 0.0
    drifts: bool = False
    crosses: bool = False

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
            bounds.append(f"alert > {self.alarm:g}" + ", after 100 steps below" * self.crosses)
        if self.floor is not None:
            off = "above" if self.upward else "off"
            small = f", all below {self.negligible:g} alike" if self.negligible else ""
            small += f", a rise counts beyond {self.harmless:g}" if self.harmless else ""
            bounds.append(f"alert: x{math.exp(6 * self.floor):.2g} and 6 robust sigmas {off} its past{small}")
        if self.start is not None:
            bounds.append(f"alert at a start: > {self.start:g} in most rows")
        return self.bad or ", ".join(bounds) or "no bound; compare layers and steps"


def by_name(asked: Any, known: Mapping[str, Item], kind: type[Any], word: str) -> Item:
    """Return the known object of a name; an object of the right class is returned as it is.

    Args:
        asked: a name or an object.
        known: the objects by name.
        kind: the class of such objects.
        word: the word for such an object in messages.

    Raises:
        ValueError: the name is unknown; the message suggests the nearest one.
        TypeError: it is neither a name nor such an object.

    >>> by_name("amx", {"amax": 1.0}, float, "statistic")
    Traceback (most recent call last):
    ...
    ValueError: unknown statistic 'amx'; did you mean 'amax'? The known ones are amax
    """
    if isinstance(asked, kind):
        item: Item = asked
        return item
    if not isinstance(asked, str):
        names = ", ".join(known)
        raise TypeError(f"a {word} is a name or an object of class {kind.__name__}, got {asked!r}; names: {names}")
    if asked not in known:
        raise ValueError(
            f"unknown {word} {asked!r}{nearest(asked, known) or '.'} The known ones are {', '.join(known)}"
        )
    return known[asked]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Return a Markdown table for the documentation; a ``|`` in a cell is escaped.

    >>> print(markdown_table(["statistic", "formula"], [("amax", "max |x|")]))
    | statistic | formula |
    |---|---|
    | amax | max \|x\| |
    """
    body = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *body])
