"""The page names and defines the statistics as the catalogue does."""

from stabnorm.companions.names import known_companions
from stabnorm.dashboard.definitions import PLAIN_NAMES, definition, from_catalogue
from stabnorm.dashboard.server import WEB
from stabnorm.monitor.statistics import CATALOGUE


def test_the_definitions_are_those_of_the_catalogue() -> None:
    written = WEB.joinpath("..", "definitions.json").read_text(encoding="utf-8")
    assert written == from_catalogue(), "run `python -m stabnorm.dashboard.definitions`"


def test_every_statistic_has_a_plain_name() -> None:
    of_companions = {s.name for kind in known_companions().values() for s in kind.statistics}
    assert {*CATALOGUE, *of_companions} <= PLAIN_NAMES.keys()
    assert len({PLAIN_NAMES[name] for name in CATALOGUE}) == len(CATALOGUE)


def test_a_statistic_of_ones_own_keeps_its_name() -> None:
    assert definition("my_own").plain == "my_own"
