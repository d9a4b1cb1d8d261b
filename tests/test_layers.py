"""Imports run downwards only, also those inside a function, and no two files import each other."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a room may import those before it, and no other.
ROOMS = (
    "errors", "_checks", "_states", "_lazy", "_log", "_registration", "functional", "clipping", "statistic", "_models",
    "gradient_noise",
    "norms", "ops", "nn", "companions", "monitor", "recalibrate", "_surgery", "fit", "convert", "switch", "progressive",
    "fold", "pretrained", "remedies", "actions", "recorder", "dashboard", "cli", "__main__", "callbacks",
)  # fmt: skip

FILES = {
    ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for package, folder in (("stabnorm", "stabnorm"), ("stabnorm.callbacks", "callbacks"))
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported(module: str) -> Iterator[str]:
    """The files of the package that a file imports anywhere; what only a type checker imports is left out."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            file = name if name in FILES else name.rpartition(".")[0]
            if file in FILES and file != module:
                yield file


def room(module: str) -> str:
    """The room of a file; the package itself, which offers what all rooms have, is none."""
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in FILES} == {"", *ROOMS}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_rooms_below_it(name: str) -> None:
    below = {"", *ROOMS[: ROOMS.index(name) + 1]}
    upward = [
        f"{module} imports {file}"
        for module in FILES
        if room(module) == name
        for file in imported(module)
        if room(file) not in below
    ]
    assert not upward


def test_no_circle_of_files() -> None:
    # A package's __init__ offers what lies in it, and what lies in it does not need the package.
    packages = {module for module, path in FILES.items() if path.name == "__init__.py"}
    graph = {module: set(imported(module)) - packages for module in FILES.keys() - packages}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises a CycleError, which names the circle
