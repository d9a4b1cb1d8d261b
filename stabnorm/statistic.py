"""`Statistic`: one row of the catalogue, or one of a user's own."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor

Axis = Literal["channel", "token", "layer", "gradient", "parameter", "depth"]
Unit = Literal["1", "x", "x^2", "token", "gradient"]
Needs = Literal[
    "tokens", "normalized", "gradients", "token_shape", "values", "sequences", "outputs", "parameters", "optimizer",
    "branches",
]  # fmt: skip
NEEDS: tuple[str, ...] = get_args(Needs)

FREE = "free from the channel moments"
TOKENS = "one pass for mean and variance of the tokens"
MEDIANS = "a sort of each token, and six passes"
PARAMETERS = "gains and biases, once a step"


Moment = TypeVar("Moment")
Value = TypeVar("Value")


def per_step(function: Callable[[Moment], Value]) -> Callable[[Moment], Value]:
    """Computed once per step, for all statistics that build on it; kept with the step's moments."""
    name = f"{function.__module__}.{function.__qualname__}"  # no attribute of the moments is called so

    @functools.wraps(function)
    def kept(now: Moment) -> Value:
        memory = vars(now)
        if name not in memory:
            memory[name] = function(now)
        value: Value = memory[name]
        return value

    return kept


def undefined(now: Any, past: Any) -> Tensor:
    """What a statistic computes that was given no function."""
    raise NotImplementedError


@dataclass(frozen=True)
class Statistic:
    """One row of the catalogue, or a statistic of your own: a name and a function of the merged moments will do.

    The function gets this step's `Moments` (or `DetailedMoments`) and the `Past` before the step, of all layers at
    once, and must not read a value from the device.

    Attributes:
        name: as in `history()`, in tags and in alerts; letters, digits and underscores.
        number: its number in the literature survey.
        formula: what it is; c runs over channels, n over tokens, hats are the layer's past.
        axis: "channel": from moments over tokens (BatchNorm's view); "token": from moments over channels (LayerNorm's);
            "layer", "gradient", "parameter", "depth": over the layers before this one, too.
        unit: "1": dimensionless; "x": that of the layer's input; "x^2"; "token": a number of tokens; "gradient".
        source: where it comes from.
        cost: what it costs beyond the channel moments.
        compute: ``(moments, past) -> [L]``, a floating tensor.
        needs: what must be gathered for it beside the channel moments, one or several of: "tokens" (`Moments.token`),
            "normalized" (`mean_n`, `var_n`, `cov_xn`), "gradients" (`gradient`); "token_shape", "values", "sequences",
            "outputs" (`DetailedMoments.detail`: means, counts, sequences, outputs), "parameters", "optimizer" (`adam`),
            "branches" (`branch_gap`). Default: nothing.
        threshold: beyond this the literature (or we, where `source` says so) calls it bad; for the closing table.
        alarm: beyond this an alert is raised at once, with no past needed.
        floor: not None: a robust z-score of its logarithm against the layer's own past is watched, and this is the
            least scale, in log units: 6 floors are the smallest change that can raise an alert.
        advice: what it means when it is over its bound, and where to look.
        least: below this it is bad, as `threshold` beyond.
        remembers: it needs what `DetailedPast` keeps, beyond `Past`.

    >>> Statistic("mean_power", compute=lambda now, past: now.mean_over_channels(now.second_moment)).needs_all
    frozenset()
    """

    name: str
    number: str = "own"
    formula: str = ""
    axis: Axis = "layer"
    unit: Unit = "1"
    source: str = ""
    cost: str = ""
    compute: Callable[[Any, Any], Tensor] = undefined
    needs: Needs | tuple[Needs, ...] | None = None
    threshold: float | None = None
    alarm: float | None = None
    floor: float | None = None
    advice: str = ""
    least: float | None = None
    remembers: bool = False

    @property
    def needs_all(self) -> frozenset[str]:
        """`needs` as a set."""
        return frozenset((self.needs,) if isinstance(self.needs, str) else self.needs or ())
