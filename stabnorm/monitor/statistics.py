"""The catalogue: every statistic with its formula, axis, source, cost and threshold. The documentation prints it.

Shape legend: L layers, C channels (padded). A statistic is a function of this step's merged `Moments` and of the
`Past` before the step, and gives one number per layer, `[L]`; NaN where it is not defined (yet). The formulas stand by
family in `stabnorm.monitor.catalogue`.

Of the survey's list, N1 is not here: the gradient noise scale needs every example's own gradient of gain and bias, that
is a backward hook with input and output gradient at each norm, which is neither cheap nor possible in a compiled graph.
SELU's domain of means and variances (arXiv 1706.02515) is not here either: it is for nets without any norm, and the
rows of the monitor are norms. `stabnorm.monitor.catalogue.collapse` says why the linearity of blocks is not.
"""

from collections.abc import Mapping, Sequence

from stabnorm._checks import check_all, check_flag, check_number, is_collection, nearest, wrong_type
from stabnorm.companions.names import known_companions
from stabnorm.monitor.catalogue.affinity import AFFINITY
from stabnorm.monitor.catalogue.collapse import COLLAPSE
from stabnorm.monitor.catalogue.depth import DEPTH
from stabnorm.monitor.catalogue.fluctuation import FLUCTUATION
from stabnorm.monitor.catalogue.gradients import GRADIENTS
from stabnorm.monitor.catalogue.outliers import OUTLIERS
from stabnorm.monitor.catalogue.parameter_health import PARAMETER_HEALTH
from stabnorm.monitor.catalogue.scale import SCALE
from stabnorm.monitor.record import SIDE_SERIES
from stabnorm.statistic import NEEDS, by_name, markdown_table, undefined
from stabnorm.statistic import Statistic as Statistic

_FAMILIES = (FLUCTUATION, SCALE, DEPTH, OUTLIERS, AFFINITY, COLLAPSE, GRADIENTS, PARAMETER_HEALTH)
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
        ValueError: for an unknown name (the nearest one is suggested), a statistic that a companion measures, an empty
            list, or a statistic of your own whose name is taken or whose `needs` are unknown.
        TypeError: for something that is no name and no `Statistic`, or one without a function.

    >>> [s.number for s in resolve(["amax", "crest"])]
    ['O1', 'O1']
    >>> [s.name for s in resolve(["amax", Statistic("my_own", compute=lambda now, past: now.mean.sum(-1))])]
    ['amax', 'my_own']
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            single = f"; a single statistic is asked for as [{preset!r}]"
            hint = single if preset in CATALOGUE else nearest(preset, PRESETS)
            raise ValueError(f"unknown preset {preset!r}: the presets are {', '.join(PRESETS)}{hint}")
        preset = PRESETS[preset]
    if not is_collection(preset) or isinstance(preset, Mapping):
        raise wrong_type("preset", preset, f"one of {', '.join(map(repr, PRESETS))}, or a list of statistics")
    chosen: dict[str, Statistic] = {}
    for asked in preset:
        if isinstance(asked, str) and asked in _of_companions():
            raise ValueError(f"{asked!r} is not in the catalogue: ask for companions=[{_of_companions()[asked]!r}]")
        statistic = by_name(asked, CATALOGUE, Statistic, "statistic")
        if not any(statistic is known for known in CATALOGUE.values()):
            _check_own(statistic)
        if chosen.setdefault(statistic.name, statistic) is not statistic:
            raise ValueError(f"two different statistics are called {statistic.name!r}; give each a name of its own")
    if not chosen:
        raise ValueError("preset: the list of statistics is empty: name at least one, or a preset such as 'standard'")
    return tuple(chosen.values())


def _of_companions() -> dict[str, str]:
    return {s.name: companion for companion, kind in known_companions().items() for s in kind.statistics}


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
    for bound in ("threshold", "alarm", "least", "floor", "start"):
        value = getattr(statistic, bound)
        if value is not None:
            check_number(f"{bound} of statistic {name!r}", value, above=0 if bound == "floor" else None)
    check_number(f"negligible of statistic {name!r}", statistic.negligible, least=0)
    check_number(f"harmless of statistic {name!r}", statistic.harmless, least=0)
    check_flag(f"remembers of statistic {name!r}", statistic.remembers)
    check_flag(f"drifts of statistic {name!r}", statistic.drifts)
    check_flag(f"upward of statistic {name!r}", statistic.upward)
    needs = () if statistic.needs is None else statistic.needs
    needs = (needs,) if isinstance(needs, str) else needs
    check_all(f"needs of statistic {name!r}", needs, str, f"one or several of {', '.join(NEEDS)}")
    unknown = sorted(statistic.needs_all - set(NEEDS))
    if unknown:
        hint = nearest(unknown[0], NEEDS)
        raise ValueError(
            f"statistic {name!r} needs {unknown[0]!r}, which nobody gathers{hint}; known: {', '.join(NEEDS)}"
        )


def catalogue_table() -> str:
    """The catalogue as a Markdown table, for the documentation; what the preset "standard" leaves out is marked *."""
    return markdown_table(
        ["statistic", "no.", "formula", "over", "source", "cost", "bad when"],
        [
            (
                f"`{s.name}`{'' if s.name in PRESETS['standard'] else ' *'}", s.number, s.formula, s.axis, s.source,
                s.cost, s.bad_when,
            )
            for s in CATALOGUE.values()
        ],
    )  # fmt: skip
