"""The catalogue: every statistic with its formula, axis, source, cost and threshold. The documentation prints it.

Shape legend: L layers, C channels (padded). A statistic is a function of this step's merged `Moments` and of the
`Past` before the step, and gives one number per layer, `[L]`; NaN where it is not defined (yet). The formulas stand by
family in `stabnorm.monitor.catalogue`.

Of the survey's list, N1 is not here: the gradient noise scale needs every example's own gradient of gain and bias, that
is a backward hook with input and output gradient at each norm, which is neither cheap nor possible in a compiled graph.
"""

import difflib
from collections.abc import Iterable, Sequence

from stabnorm.monitor.catalogue.depth import DEPTH
from stabnorm.monitor.catalogue.fluctuation import FLUCTUATION
from stabnorm.monitor.catalogue.gradients import GRADIENTS
from stabnorm.monitor.catalogue.outliers import OUTLIERS
from stabnorm.monitor.catalogue.parameter_health import PARAMETER_HEALTH
from stabnorm.monitor.catalogue.scale import SCALE
from stabnorm.monitor.catalogue.switching import SWITCHING
from stabnorm.monitor.record import SIDE_SERIES
from stabnorm.statistic import NEEDS, undefined
from stabnorm.statistic import Statistic as Statistic

_FAMILIES = (FLUCTUATION, SCALE, DEPTH, OUTLIERS, SWITCHING, GRADIENTS, PARAMETER_HEALTH)
CATALOGUE: dict[str, Statistic] = {statistic.name: statistic for family in _FAMILIES for statistic in family}
PRESETS: dict[str, tuple[str, ...]] = {
    "economy": ("mean_fluctuation", "var_fluctuation", "absmax_fluctuation"),
    "standard": (
        "running_mean_distance", "running_var_distance", "mean_discrepancy", "var_discrepancy", "mean_fluctuation",
        "var_fluctuation", "absmax_fluctuation", "scale_jump", "am_gm_ratio", "rank_share", "token_std_mean",
        "token_std_min", "token_std_max", "token_mean_mean", "token_mean_min", "token_mean_max", "eps_share", "amax",
        "crest", "feature_kurtosis", "affine_residual", "grad_gain", "grad_shift", "grad_fluctuation",
    ),
    "full": tuple(CATALOGUE),
}  # fmt: skip
_TAKEN = {*SIDE_SERIES, "nonfinite"}  # in records and alerts


def resolve(preset: str | Sequence[str | Statistic]) -> tuple[Statistic, ...]:
    """The statistics behind a preset's name or a list of statistics by name, among which may be some of your own.

    Raises:
        ValueError: for an unknown name (the nearest one is suggested), an empty list, or a statistic of your own whose
            name is taken or whose `needs` are unknown.
        TypeError: for something that is no name and no `Statistic`, or one without a function.

    >>> [s.number for s in resolve(["amax", "crest"])]
    ['O1', 'O1']
    >>> [s.name for s in resolve(["amax", Statistic("my_own", compute=lambda now, past: now.mean.sum(-1))])]
    ['amax', 'my_own']
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            hint = (
                f"; a single statistic is asked for as [{preset!r}]"
                if preset in CATALOGUE
                else _nearest(preset, PRESETS)
            )
            raise ValueError(f"unknown preset {preset!r}: the presets are {', '.join(PRESETS)}{hint}")
        preset = PRESETS[preset]
    chosen: dict[str, Statistic] = {}
    for one in preset:
        statistic = one if isinstance(one, Statistic) else _named(one)
        if CATALOGUE.get(statistic.name) is not statistic:
            _check_own(statistic)
        if chosen.setdefault(statistic.name, statistic) is not statistic:
            raise ValueError(f"two different statistics are called {statistic.name!r}; give each a name of its own")
    if not chosen:
        raise ValueError("the list of statistics is empty: name at least one, or a preset such as 'standard'")
    return tuple(chosen.values())


def _named(name: str) -> Statistic:
    if not isinstance(name, str):
        raise TypeError(f"a list of statistics holds names and Statistic objects, got {name!r}")
    if name not in CATALOGUE:
        raise ValueError(f"unknown statistic {name!r}{_nearest(name, CATALOGUE)}; known: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def _check_own(statistic: Statistic) -> None:
    name = statistic.name
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a statistic's name has letters, digits and underscores only, got {name!r}")
    if name in CATALOGUE or name in _TAKEN:
        raise ValueError(f"a statistic of your own cannot be called {name!r}, that name is taken; choose another")
    if statistic.compute is undefined or not callable(statistic.compute):
        raise TypeError(
            f"statistic {name!r} has no function: give compute=, a function (moments, past) -> one number per layer"
        )
    unknown = sorted(statistic.needs_all - set(NEEDS))
    if unknown:
        hint = _nearest(unknown[0], NEEDS)
        raise ValueError(
            f"statistic {name!r} needs {unknown[0]!r}, which nobody gathers{hint}; known: {', '.join(NEEDS)}"
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def catalogue_table() -> str:
    """The catalogue as a Markdown table, for the documentation; what the preset "standard" leaves out bears a star."""
    head = "| statistic | no. | formula | over | source | cost | bad when |\n|---|---|---|---|---|---|---|"

    def bounds(s: Statistic) -> str:
        said = [f"> {s.threshold:g}"] if s.threshold is not None else []
        if s.least is not None:
            said.append(f"< {s.least:g}")
        if s.alarm is not None and s.alarm != s.threshold:
            said.append(f"alert > {s.alarm:g}")
        elif s.alarm is not None:
            said = [f"alert > {s.alarm:g}"]
        if s.floor is not None:
            said.append(f"alert: x{2.718281828 ** (6 * s.floor):.2g} and 6 robust sigmas off its past")
        return ", ".join(said) or "no bound; compare layers and steps"

    rows = [
        f"| `{s.name}`{'' if s.name in PRESETS['standard'] else ' *'} | {s.number} | "
        f"{s.formula.replace('|', chr(92) + '|')} | {s.axis} | {s.source} | {s.cost} | {bounds(s)} |"
        for s in CATALOGUE.values()
    ]
    return "\n".join([head, *rows])
