"""What a user imports is there, and costs nothing until it is used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import stabnorm

ROOMS = (
    "actions", "callbacks", "companions", "dashboard", "fit", "fold", "monitor", "norms", "ops", "pretrained",
    "recorder", "remedies", "switch",
)  # fmt: skip
LAZY = ("stabnorm", *(f"stabnorm.{room}" for room in ROOMS))
HEAVY = ("torch", "pytorch_lightning", "lightning", "triton", "tensorboard", "numpy")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import stabnorm") == set()
    assert loaded_by(f"import {', '.join(LAZY)}") == set()


def test_the_core_loads_without_lightning_and_tensorboard() -> None:
    heavy = loaded_by("from stabnorm import ProgressiveSwitch, StabilityMonitor, find_norms, valid_tokens")
    assert heavy.isdisjoint({"pytorch_lightning", "lightning", "tensorboard", "triton"})


def test_what_a_dashboard_reads_loads_without_torch() -> None:
    assert loaded_by("import stabnorm.monitor.record, stabnorm.dashboard.heatmap") == {"numpy"}
    assert loaded_by("from stabnorm.monitor import FileRecord, read_record") == {"numpy"}


@pytest.mark.parametrize("package", LAZY)
def test_a_package_offers_what_its_type_checkers_see(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    source = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom)]
    own = [node for node in imports if node.module != "stabnorm"]  # the others are the parts of the package itself
    seen = {alias.asname: node.module for node in own for alias in node.names if alias.asname is not None}
    assert sorted(seen) == module.__all__
    for name, home in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(str(home)), name)
        assert name in dir(module)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


def test_every_package_offers_its_names_lazily_or_is_known_not_to() -> None:
    """`functional` and `nn` import at once: the one is read at every call, the other hooks on to torch's modules."""
    root = Path(stabnorm.__file__).parent
    offering = {path.parent for path in root.glob("*/__init__.py") if "import" in path.read_text(encoding="utf-8")}
    assert {path.name for path in offering} == {*ROOMS, "functional", "nn"}
    nn = importlib.import_module("stabnorm.nn")
    assert all(getattr(nn, name).__doc__ for name in nn.__all__)


@pytest.mark.parametrize("name", stabnorm.__all__)
def test_every_promised_name_is_there_and_documented(name: str) -> None:
    thing = getattr(stabnorm, name)
    assert thing.__doc__
    assert name in dir(stabnorm)


@pytest.mark.parametrize("part", [*ROOMS, "functional", "nn"])
def test_a_part_of_the_package_is_an_attribute_of_it(part: str) -> None:
    assert getattr(stabnorm, part) is importlib.import_module(f"stabnorm.{part}")
    assert loaded_by("import stabnorm; dir(stabnorm); stabnorm.monitor; stabnorm.callbacks") == set()
    code = f"import stabnorm; print(stabnorm.{part}.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == f"stabnorm.{part}\n"


@pytest.mark.parametrize("package", [*LAZY, "stabnorm.nn"])
def test_dir_lists_what_a_package_offers_and_nothing_else(package: str) -> None:
    module = importlib.import_module(package)
    public = {name for name in dir(module) if not name.startswith("__")}
    parts = {*ROOMS, "functional", "nn"} if package == "stabnorm" else set()
    assert public == {*module.__all__} | parts


def test_what_is_used_most_is_at_hand() -> None:
    from stabnorm import FileRecord, ProgressiveSwitch, Recipe, Statistic, read_record
    from stabnorm.monitor import FileRecord as there

    assert FileRecord is there
    assert {ProgressiveSwitch, Recipe, Statistic, read_record} <= {getattr(stabnorm, name) for name in stabnorm.__all__}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'stabnorm' has no attribute 'nothing'"):
        _ = stabnorm.nothing


def test_callbacks_export_what_they_promise() -> None:
    callbacks = importlib.import_module("stabnorm.callbacks")
    assert callbacks.__all__ == [
        "AdaptiveClipCallback",
        "FoldCallback",
        "GradientNoiseCallback",
        "ProgressiveNormCallback",
        "ProjectWeightsCallback",
        "StabilityCallback",
        "repair_module",
    ]
    assert callbacks.FoldCallback.__module__ == "stabnorm.callbacks.fold"
    assert callbacks.ProgressiveNormCallback.__module__ == "stabnorm.callbacks.progressive"
    assert callbacks.StabilityCallback.__module__ == "stabnorm.callbacks.stability"


def test_the_documentation_shows_the_catalogue_as_it_is() -> None:
    from stabnorm.monitor.statistics import catalogue_table

    page = (Path(__file__).parents[1] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert catalogue_table() in page


def test_a_documented_import_of_the_first_version_still_works() -> None:
    assert importlib.import_module("stabnorm.progressive").ProgressiveSwitch is stabnorm.ProgressiveSwitch
