"""Every package directory is listed in pyproject, so the wheel is complete; the link that tools need is a link."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests import check_install

ROOT = Path(__file__).parents[1]
FOLDERS = {"stabnorm": "stabnorm", "stabnorm.callbacks": "callbacks", "stabnorm.examples": "examples"}


def test_every_package_is_listed() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(pyproject["tool"]["setuptools"]["packages"])
    packages = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for package, folder in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert packages == listed


@pytest.mark.parametrize("folder", ["callbacks", "examples"])
def test_a_folder_at_the_top_is_reached_through_a_link(folder: str) -> None:
    link = ROOT / "stabnorm" / folder
    if link.is_file():
        pytest.skip("this checkout was made without symbolic links: git config core.symlinks true")
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder


def test_the_versions_agree() -> None:
    import stabnorm

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert pyproject["project"]["version"] == stabnorm.__version__


def test_every_place_promises_the_same_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest, *_, newest = check_install.promised_pythons(project)
    assert project["requires-python"] == f">={oldest}"
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"Python {oldest} to {newest}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_dependency_has_a_lower_bound_that_make_can_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", dependency) for dependency in project["dependencies"])


def test_every_extra_has_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: {*needs} for name, needs in project["optional-dependencies"].items()}
    of_torch = {"triton; platform_system == 'Linux'"}
    for name, needs in extras.items():
        bounded = {need for need in needs if re.fullmatch(r"(stabnorm\[[\w,]+\]|[\w-]+(\[\w+\])?>=[\d.]+)", need)}
        assert needs - bounded - of_torch == set(), name


def test_the_text_for_the_package_index_has_no_link_that_leads_nowhere_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / project["readme"]).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=[\"']([^\"']+)", text)
    assert [target for pair in targets for target in pair if target and not target.startswith("https://")] == []
    assert all(url.startswith("https://") for url in project.get("urls", {}).values())


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_says_how_it_is_run_once_the_package_is_installed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "__main__" in text:
        assert f"-m stabnorm.examples.{path.stem}" in text
    assert not re.search(r"^\s*(from|import) examples\b", text, flags=re.MULTILINE)


@pytest.mark.parametrize(("triton", "verdict"), [("3.7.1", "ok"), ("3.9.0", "no")])
def test_check_install_tells_versions_that_fit_torch_from_others(triton: str, verdict: str) -> None:
    if reason := check_install.unreachable():
        pytest.skip(f"no package registry answers: {reason.splitlines()[0]}")
    linux = ("--python-platform", check_install.PLATFORMS["Linux x86-64"])
    reason = check_install.resolve("-", *linux, stdin=f"torch==2.13.0\ntriton=={triton}\n")
    assert check_install.verdict(reason) == verdict


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the list of files comes from git, and this is no checkout")
def test_no_two_files_differ_by_case_alone() -> None:
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    assert len({file.lower() for file in files}) == len(files)


def test_data_that_the_code_reads_is_in_the_wheel() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = pyproject["tool"]["setuptools"]["package-data"]["stabnorm"]
    packed = {path for pattern in patterns for path in (ROOT / "stabnorm").glob(pattern)}
    read = [path for path in (ROOT / "stabnorm").rglob("*") if path.suffix in (".cpp", ".h", ".json")]
    assert set(read) <= packed
