"""Every link of the documents leads to a file or a heading that exists, and every file that they name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("stabnorm", "callbacks", "tests", "examples", "benchmarks", "docs")


def prose(document: Path) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub, and the site, give to the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    """The relative links of a document that lead nowhere."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"\w+:", link):  # the web, or mail
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file_or_a_heading(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# What it costs\n", encoding="utf-8")
    text = "[a](page.md) [b](page.md#what-it-costs) [c](gone.md) [d](page.md#gone) [e](#gone) [f](https://gone)"
    (tmp_path / "links.md").write_text(text, encoding="utf-8")
    assert broken_links(tmp_path / "links.md") == ["gone.md", "page.md#gone", "#gone"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    if document.name == "CHANGELOG.md":
        pytest.skip("a changelog names what there was")
    names = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./]*)`", prose(document))
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_page_of_the_guide_is_on_the_site() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= set(re.findall(r"^[\w/]+$", index, flags=re.MULTILINE))
