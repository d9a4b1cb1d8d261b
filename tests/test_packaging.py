"""Every package directory is listed in pyproject, so the wheel is complete; the link that tools need is a link."""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = {"stabnorm": "stabnorm", "stabnorm.callbacks": "callbacks"}


def test_every_package_is_listed() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(pyproject["tool"]["setuptools"]["packages"])
    found = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for package, folder in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert found == listed


def test_callbacks_is_reached_through_the_link() -> None:
    link = ROOT / "stabnorm" / "callbacks"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "callbacks"


def test_the_versions_agree() -> None:
    import stabnorm

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["version"] == stabnorm.__version__


def test_python_requirement_of_make_and_package_agree() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["requires-python"] == ">=3.10"
    assert "version_info < (3, 10)" in (ROOT / "Makefile").read_text()


def test_data_that_the_code_reads_is_in_the_wheel() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]["stabnorm"]
    packed = {path for pattern in patterns for path in (ROOT / "stabnorm").glob(pattern)}
    read = [path for path in (ROOT / "stabnorm").rglob("*") if path.suffix in (".cpp", ".h", ".json")]
    assert set(read) <= packed
