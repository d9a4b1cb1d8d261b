"""The companions by name, and a table of what they measure."""

from collections.abc import Sequence

from stabnorm._checks import is_collection, wrong_type
from stabnorm.companions.attention import AttentionCompanion
from stabnorm.companions.companion import Companion
from stabnorm.companions.curvature import CurvatureCompanion
from stabnorm.companions.embedding import EmbeddingCompanion
from stabnorm.companions.output import OutputCompanion
from stabnorm.companions.switching import SwitchCompanion
from stabnorm.companions.weights import WeightCompanion
from stabnorm.statistic import by_name, markdown_table


def known_companions() -> dict[str, type[Companion]]:
    """Return the companions that have a name."""
    kinds: tuple[type[Companion], ...] = (
        AttentionCompanion, WeightCompanion, EmbeddingCompanion, OutputCompanion, CurvatureCompanion, SwitchCompanion
    )  # fmt: skip
    return {kind.name: kind for kind in kinds}


def resolve_companions(companions: Sequence[str | Companion]) -> tuple[Companion, ...]:
    """Return the companions of these names; companion objects are returned as they are.

    Raises:
        ValueError: for an unknown name (the nearest one is suggested), or for two of one name.
        TypeError: for what is neither a name nor a companion.

    >>> [companion.name for companion in resolve_companions(["weights"])]
    ['weights']
    """
    if isinstance(companions, str):
        companions = [companions]
    if not is_collection(companions):
        raise wrong_type("companions", companions, "a list of names, or of objects of stabnorm.companions")
    known = {name: kind() for name, kind in known_companions().items()}
    chosen = tuple(by_name(asked, known, Companion, "companion") for asked in companions)
    names = [companion.name for companion in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"companion {name!r} is given {names.count(name)} times: give one, with a wider include=")
    return chosen


def companions_table() -> str:
    """Return all statistics as a Markdown table for the docs; a companion's first row has its name and cost."""
    rows = [
        (f"`{kind.name}`" if first else "", f"`{s.name}`", s.formula, s.source, s.bad_when, kind.cost if first else "")
        for kind in known_companions().values()
        for s in kind.statistics
        for first in [s is kind.statistics[0]]
    ]
    return markdown_table(["companion", "measure", "formula", "source", "bad when", "cost"], rows)
