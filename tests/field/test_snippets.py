"""Every snippet in README and guide runs as it stands: the blocks of a page, one after the other, from nothing."""

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "ABOUT.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONAL = (
    "accelerate",
    "peft",
    "safetensors",
    "sentence_transformers",
    "timm",
    "transformers",
)  # a block that needs one is left out without it
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The blocks of a page in a language, with their lines."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 2, m[2]) for m in BLOCK.finditer(text) if m[1] == language]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what a library says to a user's script
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
def test_the_snippets_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        if any(importlib.util.find_spec(package) is None for package in OPTIONAL if f"from {package}" in code):
            continue
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda page: page.name)
def test_a_config_names_classes_and_arguments_that_there_are(page: Path) -> None:
    yaml = pytest.importorskip("yaml")
    for _, text in blocks(page, "yaml"):
        for entry in yaml.safe_load(text)["trainer"]["callbacks"]:
            module, _, name = entry["class_path"].rpartition(".")
            getattr(importlib.import_module(module), name)(**entry["init_args"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_module_that_a_page_runs_is_there(page: Path) -> None:
    modules = re.findall(r"python -m ([\w.]+)", page.read_text(encoding="utf-8"))
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    assert missing == []


def test_every_page_is_looked_at_and_a_snippet_that_fails_is_noticed(tmp_path: Path) -> None:
    assert sum(len(blocks(page, "python")) for page in PAGES) > 15
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", encoding="utf-8")
    assert blocks(page, "python") == [(4, "x = 1\n"), (8, "assert x == 2\n")]
