"""The table of remedies is true: what it names exists, the advice names it, and the guide shows it."""

import importlib
import re
from pathlib import Path

import pytest

from stabnorm.cli import main
from stabnorm.companions.names import known_companions
from stabnorm.monitor.statistics import CATALOGUE
from stabnorm.remedies.symptoms import REMEDIES, Remedy, remedies_for, remedies_list, remedies_table
from stabnorm.statistic import Statistic

STATISTICS: dict[str, Statistic] = {
    s.name: s for s in (*CATALOGUE.values(), *(s for kind in known_companions().values() for s in kind.statistics))
}


@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda remedy: remedy.name)
def test_a_remedy_exists_and_is_documented_with_its_source(remedy: Remedy) -> None:
    module, _, name = remedy.path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    documented = found.__doc__
    for paper in re.findall(r"\d{4}\.\d{5}", remedy.source):
        assert paper in documented, f"{remedy.name} does not cite {paper}"


@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda remedy: remedy.name)
def test_a_remedy_answers_statistics_that_there_are(remedy: Remedy) -> None:
    assert set(remedy.statistics) <= STATISTICS.keys()


@pytest.mark.parametrize("name", sorted({name for remedy in REMEDIES for name in remedy.statistics}))
def test_the_advice_of_a_statistic_names_its_first_remedy(name: str) -> None:
    assert remedies_for(name)[0].path in STATISTICS[name].advice


def test_the_advice_names_only_remedies_of_the_table() -> None:
    ours = re.compile(r"stabnorm\.(?:remedies|callbacks)\.\w+")
    named = {path for statistic in STATISTICS.values() for path in ours.findall(statistic.advice)}
    assert named <= {remedy.path for remedy in REMEDIES}


def test_the_guide_shows_the_table_as_it_is() -> None:
    page = Path(__file__).parents[2] / "docs" / "remedies.md"
    assert remedies_table() in page.read_text(encoding="utf-8")


def test_every_function_of_the_package_is_in_the_table() -> None:
    package = importlib.import_module("stabnorm.remedies")
    about_them = {"Change", "REMEDIES", "Remedy", "RemedyReport", "remedies_for", "undo"}
    assert {*package.__all__} - about_them == {remedy.name for remedy in REMEDIES if "." not in remedy.name}


def test_the_command_prints_all_remedies_or_those_of_one_statistic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remedies"]) == 0
    assert capsys.readouterr().out == remedies_list() + "\n"
    assert main(["remedies", "embedding_gradient_ratio"]) == 0
    out = capsys.readouterr().out
    assert "freeze_embedding" in out
    assert "train_only_norms" not in out


def test_the_command_answers_a_slip_with_the_nearest_statistic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remedies", "embedding_gradients_ratio"]) == 1
    assert "did you mean 'embedding_gradient_ratio'" in capsys.readouterr().err
