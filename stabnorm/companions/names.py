"""The companions by name: which there are, those a user asks for, and a table of what they measure."""

import difflib
from collections.abc import Iterator, Sequence

from stabnorm.companions.attention import AttentionCompanion
from stabnorm.companions.companion import Companion
from stabnorm.companions.embedding import EmbeddingCompanion
from stabnorm.companions.output import OutputCompanion
from stabnorm.companions.weights import WeightCompanion


def known_companions() -> dict[str, type[Companion]]:
    """The companions that can be asked for by name."""
    return {kind.name: kind for kind in (AttentionCompanion, WeightCompanion, EmbeddingCompanion, OutputCompanion)}


def resolve_companions(companions: Sequence[str | Companion]) -> tuple[Companion, ...]:
    """Companions from their names, or as they are.

    Raises:
        ValueError: for an unknown name (the nearest one is suggested), or for two of one name.
        TypeError: for what is neither a name nor a companion.

    >>> [companion.name for companion in resolve_companions(["weights"])]
    ['weights']
    """
    if isinstance(companions, str):
        companions = [companions]
    found = tuple(_resolve(companions))
    names = [companion.name for companion in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"companion {name!r} is given {names.count(name)} times: give one, with a wider include=")
    return found


def _resolve(companions: Sequence[str | Companion]) -> Iterator[Companion]:
    known = known_companions()
    for given in companions:
        if isinstance(given, Companion):
            yield given
        elif not isinstance(given, str):
            raise TypeError(f"a companion is one of {', '.join(known)}, or an object of such a class; got {given!r}")
        elif given not in known:
            close = difflib.get_close_matches(given, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown companion {given!r}{hint}; known: {', '.join(known)}")
        else:
            yield known[given]()


def companions_table() -> str:
    """Every measure as a Markdown table, for the documentation; a companion's name and cost stand in its first row."""
    rows = ["| companion | measure | formula | source | bad when | cost |", "|---|---|---|---|---|---|"]
    for companion in known_companions().values():
        name, cost = f"`{companion.name}`", companion.cost
        for measure in companion.measures:
            formula, bad = (text.replace("|", "\\|") for text in (measure.formula, measure.bad))
            rows.append(f"| {name} | `{measure.name}` | {formula} | {measure.source} | {bad} | {cost} |")
            name = cost = ""
    return "\n".join(rows)
