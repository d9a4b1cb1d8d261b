"""The definition of each statistic, without torch.

The catalogue computes with torch, which may be missing where a dashboard runs. So the facts that a page shows are
kept in `definitions.json`. A run of this file, `python -m stabnorm.dashboard.definitions`, writes them again from the
catalogue, and a test compares the two.
"""

import functools
import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from stabnorm.monitor.plain_names import PLAIN_NAMES as PLAIN_NAMES


class Definition(NamedTuple):
    """What a page says about a statistic.

    Attributes:
        plain: its name in plain words; the catalogue's name if there is no other.
        formula: its formula, in words and symbols.
        unit: its unit, "1" for a plain number.
        axis: what it is taken over, see `stabnorm.statistic.Statistic`.
        bad_when: its bounds, in words.
        floor: the smallest scale of its robust z-score, in log units; None if it is not watched.
        negligible: a value below it counts as this one in the z-score.
        threshold: a value above it is bad; None if there is no such bound.
        least: a value below it is bad; None if there is no such bound.
        advice: what a value beyond the bound means, and where to look.
    """

    plain: str
    formula: str = ""
    unit: str = "1"
    axis: str = "layer"
    bad_when: str = ""
    floor: float | None = None
    negligible: float = 0.0
    threshold: float | None = None
    least: float | None = None
    advice: str = ""


@functools.cache
def _of_catalogue() -> dict[str, dict[str, Any]]:
    text = files("stabnorm.dashboard").joinpath("definitions.json").read_text(encoding="utf-8")
    known: dict[str, dict[str, Any]] = json.loads(text)
    return known


def definition(name: str) -> Definition:
    """Return what is known of a statistic; of one of your own only its name is known.

    Example:
        >>> definition("token_std_mean").plain, definition("token_std_mean").floor, definition("my_own").plain
        ('input scale', 0.05, 'my_own')
    """
    return Definition(PLAIN_NAMES.get(name, name), **_of_catalogue().get(name, {}))


def from_catalogue() -> str:
    """Return the text of `definitions.json`, made from the catalogue and the companions; needs torch."""
    from stabnorm.companions.names import known_companions
    from stabnorm.monitor.statistics import CATALOGUE

    statistics = [*CATALOGUE.values(), *(s for kind in known_companions().values() for s in kind.statistics)]
    facts = {
        s.name: {
            "formula": s.formula,
            "unit": s.unit,
            "axis": s.axis,
            "bad_when": s.bad_when,
            "floor": s.floor,
            "negligible": s.negligible,
            "threshold": s.threshold if s.threshold is not None else s.alarm,
            "least": s.least,
            "advice": s.advice,
        }
        for s in statistics
    }
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("definitions.json").write_text(from_catalogue(), encoding="utf-8")
